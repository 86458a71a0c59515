"""What runs on a device."""

RUNTIME = 1  # grows when a bundle may need what older ones lack: `hybrid.bundle.Manifest.minimum_runtime`
