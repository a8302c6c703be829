"""ScanNet's 18 detection classes, their NYU40 ids and one display colour each.

Class index 17 (`otherfurniture`) also stands for any annotated object outside the other 17 classes.
"""

DETECTION_CLASSES = (
    "cabinet",
    "bed",
    "chair",
    "sofa",
    "table",
    "door",
    "window",
    "bookshelf",
    "picture",
    "counter",
    "desk",
    "curtain",
    "refrigerator",
    "shower curtain",
    "toilet",
    "sink",
    "bathtub",
    "otherfurniture",
)
NYU40_IDS = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39)
OTHERS = len(DETECTION_CLASSES) - 1
NUM_CLASSES = len(DETECTION_CLASSES)

# Structure, not furniture: no boxes are made of these.
WALL, FLOOR, CEILING = 1, 2, 22
STRUCTURE_NYU40_IDS = frozenset({WALL, FLOOR, CEILING})
BOXLESS_NYU40_IDS = STRUCTURE_NYU40_IDS | {0}  # 0 is a label that stands for nothing

# Names of the NYU40 classes by id, as in ScanNet's label table; 0 is no class.
NYU40_NAMES = (
    *("unlabelled", "wall", "floor", "cabinet", "bed", "chair", "sofa", "table"),
    *("door", "window", "bookshelf", "picture", "counter", "blinds", "desk", "shelves"),
    *("curtain", "dresser", "pillow", "mirror", "floor mat", "clothes", "ceiling", "books"),
    *("refrigerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard", "person"),
    *("night stand", "toilet", "sink", "lamp", "bathtub", "bag", "otherstructure", "otherfurniture"),
    *("otherprop",),
)

# Boxes of structure are dropped; everything else keeps one, in class OTHERS when it is outside the 18.
NYU40_TO_CLASS = {nyu40: index for index, nyu40 in enumerate(NYU40_IDS)}


def class_of_nyu40(nyu40: int) -> int:
    """Detection class (0..17) of a NYU40 id; ids outside the 18 classes are OTHERS."""
    return NYU40_TO_CLASS.get(int(nyu40), OTHERS)
