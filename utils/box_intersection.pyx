# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Intersection volumes of oriented boxes, pair by pair: the loop that `utils/boxes.py` takes on a CPU, where it is built.

Needs Cython and a C compiler to build, and nothing but Python to run; `boxes.py` works without it.

Shapes: N, M boxes.
"""

from libc.math cimport cos, fabs, isfinite, sin, sqrt
from libc.stdlib cimport free, malloc

cdef double NOT_A_NUMBER = float("nan")


cdef struct Box:
    double x
    double y
    double z
    double half_x  # along the heading
    double half_y
    double half_z
    double heading
    double cos
    double sin
    double radius  # of the circle around the footprint
    bint finite


def box_intersection(const double[:, :] boxes_N7, const double[:, :] boxes_M7, double[:, :] out_NM):
    """Fill `out_NM` with the volumes, in cubic metres, that each of N boxes shares with each of M.

    Boxes are `centre xyz, size xyz, heading` in metres and radians. The result is exact up to the rounding of float64;
    a side of 0 or below gives 0, and a box with a number that is not finite gives NaN. The global interpreter lock is
    released while it runs.

    Args:
        boxes_N7, boxes_M7: float64 buffers, such as NumPy arrays.
        out_NM: float64 buffer to write to, which must not overlap the other two.

    Raises:
        ValueError: a buffer does not have the shape or the type that its name says.
        MemoryError: there is no room for 88 bytes a box.
    """
    cdef Py_ssize_t num_first = boxes_N7.shape[0], num_second = boxes_M7.shape[0], row, column
    if boxes_N7.shape[1] != 7 or boxes_M7.shape[1] != 7:
        raise ValueError(
            f"box_intersection takes boxes of 7 columns, not {boxes_N7.shape[1]} and {boxes_M7.shape[1]}; "
            "append heading 0 to boxes of 6."
        )
    if out_NM.shape[0] != num_first or out_NM.shape[1] != num_second:
        raise ValueError(
            f"box_intersection writes {num_first} x {num_second} volumes, but out_NM is "
            f"{out_NM.shape[0]} x {out_NM.shape[1]}; make it of that shape."
        )
    if num_first == 0 or num_second == 0:
        return
    cdef Box* boxes = <Box*>malloc((num_first + num_second) * sizeof(Box))
    if boxes == NULL:
        raise MemoryError(f"box_intersection has no memory for {num_first + num_second} boxes; pass fewer at a time.")
    cdef Box* second = boxes + num_first
    with nogil:
        for row in range(num_first):
            read_box(boxes_N7, row, &boxes[row])
        for column in range(num_second):
            read_box(boxes_M7, column, &second[column])
        for row in range(num_first):
            for column in range(num_second):
                out_NM[row, column] = shared_volume(&boxes[row], &second[column])
    free(boxes)


cdef inline void read_box(const double[:, :] boxes_K7, Py_ssize_t row, Box* box) noexcept nogil:
    cdef Py_ssize_t column
    box.finite = True
    for column in range(7):
        box.finite = box.finite and isfinite(boxes_K7[row, column])
    box.x, box.y, box.z = boxes_K7[row, 0], boxes_K7[row, 1], boxes_K7[row, 2]
    box.half_x = half_side(boxes_K7[row, 3])
    box.half_y = half_side(boxes_K7[row, 4])
    box.half_z = half_side(boxes_K7[row, 5])
    if box.half_x * box.half_y * box.half_z == 0:  # without volume; rounding must not give its footprint any
        box.half_z = 0.0
    box.heading = boxes_K7[row, 6]
    box.cos, box.sin = cos(box.heading), sin(box.heading)
    box.radius = sqrt(box.half_x * box.half_x + box.half_y * box.half_y)


cdef inline double half_side(double side) noexcept nogil:
    return side / 2 if side > 0 else 0.0


cdef inline double shared_volume(const Box* first, const Box* second) noexcept nogil:
    if not (first.finite and second.finite):
        return NOT_A_NUMBER
    cdef double height = shared_side(first.half_z, second.half_z, second.z - first.z)
    if height == 0:
        return 0.0
    cdef double shift_x = second.x - first.x, shift_y = second.y - first.y
    cdef double reach = first.radius + second.radius
    # The margin is far above rounding: what it lets through, the sum below finds to be empty.
    if shift_x * shift_x + shift_y * shift_y > 1.0001 * reach * reach:
        return 0.0
    cdef double x = shift_x * first.cos + shift_y * first.sin
    cdef double y = shift_y * first.cos - shift_x * first.sin
    if first.heading == second.heading:
        return height * shared_side(first.half_x, second.half_x, x) * shared_side(first.half_y, second.half_y, y)
    return height * shared_area(
        first.half_x,
        first.half_y,
        x,
        y,
        second.half_x,
        second.half_y,
        first.cos * second.cos + first.sin * second.sin,
        first.cos * second.sin - first.sin * second.cos,
    )


cdef inline double shared_side(double half_first, double half_second, double shift) noexcept nogil:
    """Length common to two intervals whose middles are `shift` apart."""
    cdef double upper = half_first if half_first < shift + half_second else shift + half_second
    cdef double lower = -half_first if -half_first > shift - half_second else shift - half_second
    return upper - lower if upper > lower else 0.0


cdef inline double shared_area(
    double a, double b, double x, double y, double half_x, double half_y, double turn_cos, double turn_sin
) noexcept nogil:
    """Area of [-a, a] x [-b, b] inside a turned rectangle with its middle at (x, y).

    By Green's theorem the sum over the rectangle's four directed edges of the integral of clamp(x, -a, a) dy, each
    over the part of the edge inside |y| <= b. Every term is continuous in the corners, so that coincident and nearly
    coincident edges lose nothing but rounding, and no polygon is assembled.
    """
    cdef double along_x = half_x * turn_cos, along_y = half_x * turn_sin
    cdef double across_x = -half_y * turn_sin, across_y = half_y * turn_cos
    if fabs(x) >= a + fabs(along_x) + fabs(across_x) or fabs(y) >= b + fabs(along_y) + fabs(across_y):
        return 0.0
    cdef double corners_x[5]
    cdef double corners_y[5]
    corners_x[0], corners_y[0] = x + along_x + across_x, y + along_y + across_y
    corners_x[1], corners_y[1] = x - along_x + across_x, y - along_y + across_y
    corners_x[2], corners_y[2] = x - along_x - across_x, y - along_y - across_y
    corners_x[3], corners_y[3] = x + along_x - across_x, y + along_y - across_y
    corners_x[4], corners_y[4] = corners_x[0], corners_y[0]
    cdef double area = 0.0
    cdef int edge
    for edge in range(4):
        area += area_under(
            corners_x[edge], corners_y[edge], corners_x[edge + 1], corners_y[edge + 1], a, b
        )
    return area if area > 0 else 0.0


cdef inline double area_under(
    double start_x, double start_y, double end_x, double end_y, double a, double b
) noexcept nogil:
    """Integral of clamp(x, -a, a) dy along the part of an edge with |y| <= b."""
    cdef double low_y = clamp(start_y, b), high_y = clamp(end_y, b)
    if low_y == high_y:
        return 0.0
    cdef double first_x = start_x, last_x = end_x
    if low_y != start_y:
        first_x = start_x + (end_x - start_x) * ((low_y - start_y) / (end_y - start_y))
    if high_y != end_y:
        last_x = start_x + (end_x - start_x) * ((high_y - start_y) / (end_y - start_y))
    return mean_clamped(first_x, last_x, a) * (high_y - low_y)


cdef inline double mean_clamped(double start, double end, double limit) noexcept nogil:
    """Mean of clamp(x, -limit, limit) for x going evenly from start to end."""
    cdef double low = start if start < end else end, high = end if start < end else start
    if high <= -limit:
        return -limit
    if low >= limit:
        return limit
    cdef double between = (clamp(low, limit) + clamp(high, limit)) / 2, mean = between
    if low < -limit:
        mean += (-limit - low) / (high - low) * (-limit - between)
    if high > limit:
        mean += (high - limit) / (high - low) * (limit - between)
    return mean


cdef inline double clamp(double value, double limit) noexcept nogil:
    return -limit if value < -limit else limit if value > limit else value
