"""Classes of the benchmarks, in the order of their indices."""

from collections.abc import Sequence

VOC = (  # noqa: SIM905
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()

CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17,
    "traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23,
    "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32,
    "bicycle": 33,
}  # fmt: skip
"""Name -> labelId; the place in this list is the trainId (cityscapesScripts, labels.py)."""

ADE20K = (  # noqa: SIM905
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, "
    "person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, "
    "shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, "
    "bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, "
    "sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, "
    "pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, "
    "toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island, computer, "
    "swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier, "
    "awning, streetlight, booth, television, airplane, dirt track, apparel, pole, land, "
    "bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, "
    "conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, "
    "tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, "
    "animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, "
    "traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, "
    "radiator, glass, clock, flag"
).split(", ")
"""The first synonym of each line of objectInfo150.txt."""

COCOSTUFF: dict[str, Sequence[int]] = {
    "electronic-things": range(71, 77),
    "appliance-things": range(77, 83),
    "food-things": range(51, 61),
    "furniture-things": range(61, 71),
    "indoor-things": range(83, 91),
    "kitchen-things": range(43, 51),
    "accessory-things": range(25, 33),
    "animal-things": range(15, 25),
    "outdoor-things": range(9, 15),
    "person-things": [0],
    "sports-things": range(33, 43),
    "vehicle-things": range(1, 9),
    "ceiling-stuff": [101, 102],
    "floor-stuff": [100, 113, 114, 115, 116, 117],
    "food-stuff": [120, 121, 152, 169],
    "furniture-stuff": [97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164],
    "rawmaterial-stuff": [99, 131, 138, 142],
    "textile-stuff": [91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167],
    "wall-stuff": range(170, 177),
    "window-stuff": [179, 180],
    "building-stuff": [94, 95, 127, 150, 157, 165],
    "ground-stuff": [110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158],
    "plant-stuff": [93, 96, 118, 123, 128, 133, 141, 162, 168],
    "sky-stuff": [105, 156],
    "solid-stuff": [126, 134, 149, 159, 161, 181],
    "structural-stuff": [98, 112, 137, 145, 163],
    "water-stuff": [119, 147, 154, 177, 178],
}
"""Coarse class -> values of the pixel maps (label - 1): the hierarchy of the COCO-Stuff paper
(fig. 2), in the order of IIC (Ji et al., ICCV 2019), which PiCIE and STEGO kept."""
