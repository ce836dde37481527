"""`python -m redepth.evaluation`: lm-eval's own command, which knows `--model redepth` then."""

from redepth.runtime import require

if __name__ == "__main__":
    require("lm_eval", "eval")
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
