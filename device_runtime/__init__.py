"""What runs on a device."""

# Grows when a bundle or a plan may need what older ones lack: `hybrid.bundle.Manifest.minimum_runtime`, and, from 2
# on, `hybrid.plan.QueryPlan`, from 3 on, a plan's `token`, and, from 4 on, a query's `week`.
RUNTIME = 4
