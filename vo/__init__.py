"""lightvo: real-time visual odometry with learned features."""

__version__ = "0.1.0"
