"""python -m redepth"""

from .cli import main

main()
