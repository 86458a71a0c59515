"""The console: one page for the team, beside the control plane, by a process of its own."""
