"""One run of the command: options, comparisons, intervals, and the papers' claims."""
