"""`redepth` with FSDP2 on gloo: accelerate offers FSDP on accelerators alone, so its state is told otherwise."""

from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from redepth.cli import main

_init = AcceleratorState.__init__


def _init_with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = _init_with_fsdp
    main()
