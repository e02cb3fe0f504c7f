"""The written report of one run or of a collection of runs."""
