"""Prints the poses of a run and what happens to them, with lightvo's client; tools/subscribe_raw.py does without it."""

import sys

from vo.client import DEFAULT_ENDPOINT, Client

with Client(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_ENDPOINT) as client:
    for pose in client.poses():  # every pose from the first one on, in order; ends with the run
        position = None if pose.T_world_camera is None else pose.T_world_camera[:3, 3]
        print(pose.frame_index, pose.timestamp_ns, pose.status.value, position, flush=True)
        for gap in client.take_gaps():
            print(f"lost {gap.num_messages} messages", file=sys.stderr)
