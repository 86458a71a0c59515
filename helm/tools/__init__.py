"""What checks the chart: `install` builds the programs, `check` needs no cluster, `cluster` has a real API server."""
