import sys

from report.page import main
from run.command import command

sys.argv[0] = "report"  # in what is said
command(main)
