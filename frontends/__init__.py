"""Image to features to matches: one file per method. Knows no camera, time or pose, and never imports `vo`."""
