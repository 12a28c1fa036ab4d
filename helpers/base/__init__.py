"""What everything stands on: parameters, this machine, records, the page, figures, files, processes."""
