"""Prints the poses of a run: all it takes to read the wire format. Needs pyzmq, msgpack and numpy, not lightvo."""

import sys

import msgpack
import numpy as np
import zmq

socket = zmq.Context().socket(zmq.SUB)
socket.connect(sys.argv[1] if len(sys.argv) > 1 else "tcp://127.0.0.1:5570")
socket.subscribe(b"pose\0")
while True:
    message = socket.recv()
    start = message.index(b"\0") + 5  # topic, zero byte, length of the header in 4 bytes
    end = start + int.from_bytes(message[start - 4 : start], "little")
    header = msgpack.unpackb(message[start:end])
    arrays = {}
    for name, (dtype, shape, offset) in header["arrays"].items():
        first = (end + 7) // 8 * 8 + offset
        arrays[name] = np.frombuffer(message, dtype, int(np.prod(shape)), first).reshape(shape)
    print(header["sequence"], header["capture_time_ns"], header["status"], arrays.get("position_xyz"), flush=True)
