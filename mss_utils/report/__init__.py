"""The written report of one run or of a collection of runs.

tables of the runs --facts.py--> facts.json --typesetting.py, report/report.typ--> PDF, HTML
"""

from mss_utils.report.typesetting import build_report, write_report
