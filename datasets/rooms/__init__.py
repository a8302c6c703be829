"""Generated rooms: furnished indoor scenes in ScanNet's own raw format, with annotations in the official schemas.

`generate_room` makes one room in memory from a seed, `write_scan` and `write_rooms` put rooms on disk.
"""

from .generate import candidate_cameras, generate_room
from .room import Room, RoomObject
from .version import ROOMS_VERSION, distribution_hash
from .write import room_seed, scene_id_of, write_rooms, write_scan

__all__ = [
    "ROOMS_VERSION",
    "Room",
    "RoomObject",
    "candidate_cameras",
    "distribution_hash",
    "generate_room",
    "room_seed",
    "scene_id_of",
    "write_rooms",
    "write_scan",
]
