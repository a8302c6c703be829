"""Colours of boxes (red, green, blue), the same in every picture, page and viewer."""

Color = tuple[int, int, int]

ANSWERED: Color = (220, 38, 38)
TRUE: Color = (22, 163, 74)
ASKED: Color = (37, 99, 235)  # the object that a question or a caption is about
DETECTED: Color = (217, 119, 6)  # boxes of a file, too
ANNOTATED: Color = (148, 163, 184)

# By what the viewers call a layer of boxes.
LAYERS = {"answered": ANSWERED, "true": TRUE, "asked": ASKED, "boxes": DETECTED, "objects": ANNOTATED}
