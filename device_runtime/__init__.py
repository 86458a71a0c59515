"""What runs on a device."""

# Grows when a bundle or a plan may need what older ones lack: `hybrid.bundle.Manifest.minimum_runtime`, and, from 2
# on, `hybrid.plan.QueryPlan`, and, from 3 on, a plan's `token`.
RUNTIME = 3
