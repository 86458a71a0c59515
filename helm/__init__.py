"""The chart, and beside it what checks it."""
