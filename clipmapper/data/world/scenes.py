"""The built-in world: rendered scenes of one to four objects, with the pixels of every object known.

A scene is a pure function of ``(seed, split, index)``: nothing is stored, every machine renders the same
scenes, and two splits never share one. Questions about a scene live in
:mod:`clipmapper.data.world.questions`, captions in :mod:`clipmapper.data.world.captions`.
"""

import math
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import UInt8

IMAGE_SIZE = 72  # pixels: 6 × 6 patches of 12 pixels, about one small object a patch
# Four that differ in local detail too (a hole, corners, slants, thin bars). A disc and a square differ in
# little but their corners, and telling them apart takes a small vision transformer several times longer.
SHAPES = ("ring", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZES = ("small", "large")
MAX_OBJECTS = 4

# One colour is held out for every shape, four different colours: no colour and no shape is missing from
# training, only their combination. Neither the shipped CLIP nor the mapper is trained on these.
HELD_OUT = frozenset({("red", "square"), ("green", "triangle"), ("blue", "cross"), ("yellow", "ring")})

_RGB = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 215),
    "yellow": (235, 210, 50),
    "purple": (150, 50, 185),
    "cyan": (60, 205, 215),
}
_RADIUS = {"small": (7.6, 8.8), "large": (12.0, 13.6)}  # pixels
_RENDER_BATCH = 256
_WINDOW = 34  # pixels: side of the square that holds the largest object with its soft edge


@dataclass(frozen=True)
class SceneObject:
    """One object. ``x``, ``y`` (centre) and ``radius`` in pixels, ``rotation`` in radians."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    rotation: float

    @property
    def combination(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """Objects from back to front (a later one may cover a little of an earlier one)."""

    key: str  # seeds everything random about the scene: "seed/split/index"
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class RenderedScenes:
    """Pixels of a batch of scenes and, for every pixel, which object is seen there."""

    images: UInt8[np.ndarray, "scenes height width 3"]
    instances: UInt8[np.ndarray, "scenes height width"]  # 0 = background, k + 1 = object k


def scene_random(seed: int, split: str, index: int) -> random.Random:
    """The generator that everything symbolic about one scene is drawn from."""
    return random.Random(f"{seed}/{split}/{index}")


def draw_combination(rng: random.Random, *, held_out: bool = False) -> tuple[str, str]:
    """A colour and a shape that training may see (or, with ``held_out``, one that it never sees)."""
    if held_out:
        return rng.choice(sorted(HELD_OUT))
    while True:
        combination = rng.choice(COLOURS), rng.choice(SHAPES)
        if combination not in HELD_OUT:
            return combination


def place_objects(rng: random.Random, looks: Sequence[tuple[str, str, str]]) -> tuple[SceneObject, ...]:
    """Put objects of the given (colour, shape, size) anywhere on the image, slight occlusion allowed."""
    while True:
        placed: list[SceneObject] = []
        for colour, shape, size in looks:
            for _ in range(30):
                radius = rng.uniform(*_RADIUS[size])
                margin = 0.9 * radius + 1
                x, y = rng.uniform(margin, IMAGE_SIZE - margin), rng.uniform(margin, IMAGE_SIZE - margin)
                if all(math.hypot(x - o.x, y - o.y) > 0.85 * (radius + o.radius) for o in placed):
                    turn = math.pi if shape == "ring" else math.pi / 24
                    placed.append(SceneObject(shape, colour, size, x, y, radius, rng.uniform(-turn, turn)))
                    break
            else:
                break  # crowded: start the whole scene again rather than bias later objects to the rim
        if len(placed) == len(looks):
            return tuple(placed)


def draw_scene(
    seed: int, split: str, index: int, *, objects: tuple[int, int] = (1, MAX_OBJECTS), held_out: bool = False
) -> Scene:
    """Scene ``index`` of a split, with a number of objects in ``objects`` (both ends included).

    Three scenes in four are built around an attribute that one, two or (most often) three objects share:
    independent objects would almost never give three of a colour to count, and the few scenes that do would
    be learnt by heart. With ``held_out`` at least one object has a colour–shape combination that training
    never sees.
    """
    rng = scene_random(seed, split, index)
    low, high = objects
    count = rng.randint(low, high)
    looks = []
    if rng.random() < 0.75:
        kind = rng.randrange(2)  # 0: colour, 1: shape
        value = rng.choice((COLOURS, SHAPES)[kind])
        sharing = min(rng.choice((1, 2, 3, 3)), high)
        count = max(count, sharing)
        while len(looks) < count:
            combination = draw_combination(rng)
            if (combination[kind] == value) == (len(looks) < sharing):
                looks.append((*combination, rng.choice(SIZES)))
    else:
        looks = [(*draw_combination(rng), rng.choice(SIZES)) for _ in range(count)]
    if held_out:
        position = rng.randrange(count)
        looks[position] = (*draw_combination(rng, held_out=True), looks[position][2])
    rng.shuffle(looks)
    return Scene(f"{seed}/{split}/{index}", place_objects(rng, looks))


def confusable_scene(scene: Scene, rng: random.Random) -> Scene:
    """Almost the same scene: a hard negative for contrastive training.

    One object gets another shape, colour or size, or two objects swap colours, or everything moves: a
    caption tells the two apart only by knowing that one thing, what is bound to what, and where it is.
    Shapes change most often, because they are what a contrastive model learns last.
    """
    while True:
        looks = [[o.colour, o.shape, o.size] for o in scene.objects]
        change = rng.choice(("shape", "shape", "colour", "size", "swap", "place"))
        position = rng.randrange(len(looks))
        if change == "swap":
            other = rng.randrange(len(looks))
            looks[position][0], looks[other][0] = looks[other][0], looks[position][0]
        elif change != "place":
            attribute = ("colour", "shape", "size").index(change)
            values = (COLOURS, SHAPES, SIZES)[attribute]
            looks[position][attribute] = rng.choice([v for v in values if v != looks[position][attribute]])
        same = looks == [[o.colour, o.shape, o.size] for o in scene.objects]
        allowed = not any((colour, shape) in HELD_OUT for colour, shape, _ in looks)
        if allowed and (change == "place") == same:
            # Unless it is the places that change they stay, but for what another size takes.
            return _rearranged(scene, looks, rng, stay=change != "place")


def _rearranged(scene: Scene, looks: Sequence[Sequence[str]], rng: random.Random, stay: bool) -> Scene:
    key = f"{scene.key}/{rng.random()}"
    if not stay:
        return Scene(key, place_objects(rng, [tuple(look) for look in looks]))
    objects = []
    for before, (colour, shape, size) in zip(scene.objects, looks, strict=True):
        radius = before.radius if size == before.size else rng.uniform(*_RADIUS[size])
        objects.append(replace(before, colour=colour, shape=shape, size=size, radius=radius))
    return Scene(key, tuple(objects))


def render(scenes: Sequence[Scene], *, empty: bool = False) -> RenderedScenes:
    """Draw scenes: soft-edged objects on a textured, noisy background; ``empty``: the background alone, which
    is the same to the last bit where no object is.

    Vectorised over the batch; signed distances are evaluated only in a window around each object.
    """
    n, size, pad = len(scenes), IMAGE_SIZE, _WINDOW
    noise = [np.random.Generator(np.random.Philox(key=_noise_key(scene.key))) for scene in scenes]
    background = _backgrounds(noise)
    canvas = np.zeros((n, size + 2 * pad, size + 2 * pad, 3), np.float32)
    canvas[:, pad:-pad, pad:-pad] = background
    instances = np.zeros(canvas.shape[:3], np.uint8)
    offsets = np.arange(_WINDOW)
    for slot in range(max(len(s.objects) for s in scenes)):
        rows = np.array([i for i, s in enumerate(scenes) if len(s.objects) > slot])
        drawn = [scenes[i].objects[slot] for i in rows]
        centre = np.array([(o.x, o.y) for o in drawn], np.float32)
        corner = np.floor(centre).astype(int) - _WINDOW // 2
        across = corner[:, 0, None] + offsets  # [objects, window] pixel columns
        down = corner[:, 1, None] + offsets
        dx = (across + 0.5 - centre[:, :1])[:, None, :]
        dy = (down + 0.5 - centre[:, 1:])[:, :, None]
        cover = _coverage(dx, dy, drawn)
        colour = np.array([_RGB[o.colour] for o in drawn], np.float32)
        jitter = np.stack([noise[i].uniform(-18, 18, 3) for i in rows]).astype(np.float32)
        light = 1 - 0.012 * (dx + dy)  # lit from the upper left
        paint = (colour + jitter)[:, None, None, :] * light[..., None]
        if empty:  # (behind the random numbers that the objects take)
            continue
        index = rows[:, None, None], (down + pad)[:, :, None], (across + pad)[:, None, :]
        canvas[index] += cover[..., None] * (paint - canvas[index])
        instances[index] = np.where(cover > 0.5, slot + 1, instances[index])
    inside = canvas[:, pad:-pad, pad:-pad]
    grain = np.stack([g.integers(-14, 15, (size, size, 3), dtype=np.int8) for g in noise])
    images = np.clip(inside + grain, 0, 255).astype(np.uint8)
    return RenderedScenes(images, np.ascontiguousarray(instances[:, pad:-pad, pad:-pad]))


def _noise_key(key: str) -> int:
    return random.Random("noise/" + key).getrandbits(64)


def render_all(
    scenes: Sequence[Scene],
) -> tuple[UInt8[np.ndarray, "scenes height width 3"], UInt8[np.ndarray, "scenes height width"]]:
    """Images and instances of any number of scenes, a batch at a time."""
    batches = [scenes[i : i + _RENDER_BATCH] for i in range(0, len(scenes), _RENDER_BATCH)]
    with ThreadPoolExecutor() as pool:  # NumPy lets go of the interpreter while it draws
        parts = list(pool.map(render, batches))
    return np.concatenate([p.images for p in parts]), np.concatenate([p.instances for p in parts])


def _backgrounds(noise: Sequence[np.random.Generator]) -> np.ndarray:
    """[scenes, height, width, 3]: a dark greyish tone with a gradient and two faint waves.

    Dark, so that every object is brighter than what is behind it: outlines are then the same for all
    colours, and a small vision transformer learns shapes in minutes rather than hours.
    """
    grid = np.arange(IMAGE_SIZE, dtype=np.float32) / IMAGE_SIZE - 0.5
    draws = np.stack([g.random(16, dtype=np.float32) for g in noise])[:, :, None, None]
    y, x = grid[None, :, None], grid[None, None, :]
    tone = 30 + 40 * draws[:, 0] + 24 * ((draws[:, 1] - 0.5) * x + (draws[:, 2] - 0.5) * y)
    for first in (3, 7):
        angle, frequency, phase, strength = (draws[:, first + k] for k in range(4))
        wave = (x * np.cos(np.pi * angle) + y * np.sin(np.pi * angle)) * (12 + 40 * frequency)
        tone = tone + (3 + 6 * strength) * np.sin(wave + 2 * np.pi * phase)
    tint = 16 * (draws[:, 11:14, 0, 0] - 0.5)
    return tone[..., None] + tint[:, None, None, :]


def _coverage(dx: np.ndarray, dy: np.ndarray, drawn: Sequence[SceneObject]) -> np.ndarray:
    """Share of each pixel that the object covers, from its signed distance: [objects, window, window]."""
    radius = np.array([o.radius for o in drawn], np.float32)[:, None, None]
    angle = np.array([o.rotation for o in drawn], np.float32)[:, None, None]
    shape = np.array([SHAPES.index(o.shape) for o in drawn])
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / radius
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / radius
    distance = np.empty_like(u)
    for kind, signed_distance in enumerate(_SIGNED_DISTANCES):
        chosen = shape == kind
        distance[chosen] = signed_distance(u[chosen], v[chosen])
    return np.clip(0.5 - distance * radius, 0, 1)


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    distance = np.hypot(u, v)
    return np.maximum(distance - 1.0, 0.55 - distance)


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - 0.86


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Equilateral, apex up (v grows downwards); the inner radius 0.55 gives it about a circle's area.
    return np.maximum(0.866 * np.abs(u) - 0.5 * (v - 0.12), v - 0.12) - 0.57


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - 1.05, b - 0.3), np.maximum(a - 0.3, b - 1.05))


_SIGNED_DISTANCES = (_ring, _square, _triangle, _cross)
