"""Our messages as the ones that Foxglove draws: its published schemas, in Protocol Buffers.

Foxglove's messages lose what they have no field for (status, covariance, sequence numbers, ids): they are for looking.
The recording holds the messages of `lightvo/1` beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vo.camera_models import HALF_PIXEL
from vo.messages import quat_xyzw_from_rotation
from vo.output import OutputError
from vo.recording import ChannelSpec
from vo.types import Camera, CameraModel, FloatArray, PoseEstimate

try:
    from foxglove_schemas_protobuf.CameraCalibration_pb2 import CameraCalibration
    from foxglove_schemas_protobuf.Color_pb2 import Color
    from foxglove_schemas_protobuf.CompressedImage_pb2 import CompressedImage
    from foxglove_schemas_protobuf.FrameTransform_pb2 import FrameTransform
    from foxglove_schemas_protobuf.ImageAnnotations_pb2 import ImageAnnotations
    from foxglove_schemas_protobuf.PackedElementField_pb2 import PackedElementField
    from foxglove_schemas_protobuf.Point2_pb2 import Point2
    from foxglove_schemas_protobuf.PointCloud_pb2 import PointCloud
    from foxglove_schemas_protobuf.PointsAnnotation_pb2 import PointsAnnotation
    from foxglove_schemas_protobuf.Pose_pb2 import Pose
    from foxglove_schemas_protobuf.PoseInFrame_pb2 import PoseInFrame
    from foxglove_schemas_protobuf.PosesInFrame_pb2 import PosesInFrame
    from foxglove_schemas_protobuf.Quaternion_pb2 import Quaternion
    from foxglove_schemas_protobuf.Vector3_pb2 import Vector3
    from google.protobuf.descriptor import FileDescriptor
    from google.protobuf.descriptor_pb2 import FileDescriptorSet
    from google.protobuf.message import Message
    from google.protobuf.timestamp_pb2 import Timestamp
except ImportError as error:
    raise OutputError(f"recordings need more packages ({error}): pip install 'lightvo[record]'") from None

POSE_TOPIC = "/camera/pose"
TRANSFORM_TOPIC = "/tf"
CALIBRATION_TOPIC = "/camera/calibration"
IMAGE_TOPIC = "/camera/image"
KEYFRAME_TOPIC = "/camera/keyframe"
TRACKS_TOPIC = "/camera/tracks"
KEYFRAMES_TOPIC = "/keyframes"
LANDMARKS_TOPIC = "/landmarks"
CAMERA_FRAME = "camera"

# Tracks with a landmark are green, the others orange.
_TRACK_COLORS = ((True, Color(r=0.2, g=0.9, b=0.3, a=1.0)), (False, Color(r=1.0, g=0.6, b=0.1, a=1.0)))
_TRACK_SIZE_PX = 4.0
_NS_PER_S = 1_000_000_000
_POINT_DTYPE = np.dtype([("xyz", "<f4", 3), ("rgba", "u1", 4)])
_DISTORTION_MODELS = {
    CameraModel.PINHOLE: ("plumb_bob", 5),
    CameraModel.BROWN: ("plumb_bob", 5),
    CameraModel.FISHEYE: ("kannala_brandt", 4),
}


@dataclass(frozen=True, slots=True)
class FoxgloveMessage:
    """The bytes of a message and the channel it goes to."""

    topic: str
    data: bytes


def channels() -> tuple[ChannelSpec, ...]:
    """The channels that carry Foxglove's messages, each with the schema that describes them."""
    classes: tuple[tuple[str, type[Message]], ...] = (
        (POSE_TOPIC, PoseInFrame),
        (TRANSFORM_TOPIC, FrameTransform),
        (CALIBRATION_TOPIC, CameraCalibration),
        (IMAGE_TOPIC, CompressedImage),
        (KEYFRAME_TOPIC, CompressedImage),
        (TRACKS_TOPIC, ImageAnnotations),
        (KEYFRAMES_TOPIC, PosesInFrame),
        (LANDMARKS_TOPIC, PointCloud),
    )
    return tuple(
        ChannelSpec(topic, "protobuf", kind.DESCRIPTOR.full_name, "protobuf", _descriptor_set(kind))
        for topic, kind in classes
    )


def world_frame(segment_id: int) -> str:
    """Segments have no link to each other, so each has a world of its own."""
    return "world" if segment_id == 0 else f"world_{segment_id}"


def from_pose(pose: PoseEstimate, time_ns: int) -> tuple[FoxgloveMessage, ...]:
    """The pose as such and as the transform that ties the camera to the world; none of a frame that is lost."""
    if pose.T_world_camera is None:
        return ()
    frame, stamp, body = world_frame(pose.segment_id), _timestamp(time_ns), _pose(pose.T_world_camera)
    return (
        FoxgloveMessage(POSE_TOPIC, PoseInFrame(timestamp=stamp, frame_id=frame, pose=body).SerializeToString()),
        FoxgloveMessage(
            TRANSFORM_TOPIC,
            FrameTransform(
                timestamp=stamp,
                parent_frame_id=frame,
                child_frame_id=CAMERA_FRAME,
                translation=body.position,
                rotation=body.orientation,
            ).SerializeToString(),
        ),
    )


def from_camera(camera: Camera, time_ns: int) -> tuple[FoxgloveMessage, ...]:
    """The calibration. Distortion beyond Foxglove's models (thin prisms, tilted sensors) is left out of it."""
    model, coefficients = _distortion(camera)
    K = camera.K
    calibration = CameraCalibration(
        timestamp=_timestamp(time_ns),
        frame_id=CAMERA_FRAME,
        width=camera.width,
        height=camera.height,
        distortion_model=model,
        D=coefficients,
        K=K.ravel().tolist(),
        R=np.eye(3).ravel().tolist(),
        P=np.hstack([K, np.zeros((3, 1))]).ravel().tolist(),
    )
    return (FoxgloveMessage(CALIBRATION_TOPIC, calibration.SerializeToString()),)


def from_jpeg(jpeg: bytes, time_ns: int, topic: str = IMAGE_TOPIC) -> tuple[FoxgloveMessage, ...]:
    """The image of the camera."""
    image = CompressedImage(timestamp=_timestamp(time_ns), frame_id=CAMERA_FRAME, data=jpeg, format="jpeg")
    return (FoxgloveMessage(topic, image.SerializeToString()),)


def from_tracks(keypoints: FloatArray, has_landmark: NDArray[np.bool_], time_ns: int) -> tuple[FoxgloveMessage, ...]:
    """Keypoints (N, 2) px of the image they are drawn on; Foxglove counts from the corner of the top-left pixel."""
    marks = [
        PointsAnnotation(
            timestamp=_timestamp(time_ns),
            type=PointsAnnotation.POINTS,
            points=[Point2(x=x, y=y) for x, y in (keypoints[has_landmark == kind] + HALF_PIXEL).tolist()],
            outline_color=color,
            fill_color=color,
            thickness=_TRACK_SIZE_PX,
        )
        for kind, color in _TRACK_COLORS
    ]
    annotations = ImageAnnotations(timestamp=_timestamp(time_ns), points=marks)
    return (FoxgloveMessage(TRACKS_TOPIC, annotations.SerializeToString()),)


def jpeg_of(data: bytes) -> bytes:
    """The JPEG file in the bytes of a CompressedImage."""
    return bytes(CompressedImage.FromString(data).data)


def from_keyframes(T_world_keyframes: FloatArray, segment_id: int, time_ns: int) -> tuple[FoxgloveMessage, ...]:
    """Keyframes (K, 4, 4) where they are now."""
    poses = PosesInFrame(
        timestamp=_timestamp(time_ns), frame_id=world_frame(segment_id), poses=[_pose(T) for T in T_world_keyframes]
    )
    return (FoxgloveMessage(KEYFRAMES_TOPIC, poses.SerializeToString()),)


def from_landmarks(
    landmarks: FloatArray, colors: NDArray[np.uint8], segment_id: int, time_ns: int
) -> tuple[FoxgloveMessage, ...]:
    """Points (L, 3) in the world with colours (L, 3): those that are new or have moved, not the whole map."""
    packed = np.zeros(len(landmarks), _POINT_DTYPE)
    packed["xyz"] = landmarks
    packed["rgba"][:, :3] = colors
    packed["rgba"][:, 3] = 255
    fields = [
        PackedElementField(name=name, offset=4 * i, type=PackedElementField.FLOAT32) for i, name in enumerate("xyz")
    ] + [
        PackedElementField(name=name, offset=12 + i, type=PackedElementField.UINT8)
        for i, name in enumerate(("red", "green", "blue", "alpha"))
    ]
    cloud = PointCloud(
        timestamp=_timestamp(time_ns),
        frame_id=world_frame(segment_id),
        pose=_pose(np.eye(4)),
        point_stride=_POINT_DTYPE.itemsize,
        fields=fields,
        data=packed.tobytes(),
    )
    return (FoxgloveMessage(LANDMARKS_TOPIC, cloud.SerializeToString()),)


def _pose(T: FloatArray) -> Pose:
    x, y, z, w = quat_xyzw_from_rotation(T[:3, :3]).tolist()
    px, py, pz = T[:3, 3].tolist()
    return Pose(position=Vector3(x=px, y=py, z=pz), orientation=Quaternion(x=x, y=y, z=z, w=w))


def _distortion(camera: Camera) -> tuple[str, list[float]]:
    """Foxglove's name for the model and its coefficients, in the same order as ours."""
    model, num_coefficients = _DISTORTION_MODELS[camera.model]
    values = camera.distortion.tolist()
    if len(values) > num_coefficients:
        return "rational_polynomial", values[:8]
    return model, values + [0.0] * (num_coefficients - len(values))


def _timestamp(time_ns: int) -> Timestamp:
    return Timestamp(seconds=time_ns // _NS_PER_S, nanos=time_ns % _NS_PER_S)


def _descriptor_set(kind: type[Message]) -> bytes:
    """The file that defines a message and all files it needs, those first that others need."""
    files: dict[str, FileDescriptor] = {}

    def visit(descriptor: FileDescriptor) -> None:
        for dependency in descriptor.dependencies:
            visit(dependency)
        files.setdefault(descriptor.name, descriptor)

    visit(kind.DESCRIPTOR.file)
    result = FileDescriptorSet()
    for descriptor in files.values():
        descriptor.CopyToProto(result.file.add())
    return bytes(result.SerializeToString())
