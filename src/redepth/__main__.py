"""python -m redepth"""

from redepth.cli import main

main()
