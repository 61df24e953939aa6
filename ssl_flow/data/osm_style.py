"""How OpenStreetMap's tags become layers: one table, and the land cover that follows from it.

The widths are those drawn, in metres: wider than the road, so that a tile shows it. A line is at
least one pixel wide. Left out: lines in tunnels, ways with area=yes, and the sea, which is not an
area in OpenStreetMap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Style:
    """Objects that have one of the tags are drawn into a channel."""

    channel: str
    draw: Literal["line", "fill", "dot"]
    tags: Mapping[str, str]  # key -> values with spaces between, "*" = any but "no"
    metres: float = 0  # a line's width, a dot's diameter
    landcover: str | None = None


_LINK = "motorway_link trunk_link primary_link secondary_link"
_PLACES = (
    "school kindergarten college university library hospital clinic doctors pharmacy restaurant "
    "cafe bar pub fast_food bank post_office townhall place_of_worship police fire_station theatre "
    "cinema community_centre fuel marketplace nursing_home"
)
_STAYS = "hotel hostel guest_house museum attraction viewpoint camp_site"

STYLES = (
    Style("road_major", "line",
          {"highway": f"motorway trunk primary secondary {_LINK}"}, 16, "road"),
    Style("road_minor", "line",
          {"highway": "tertiary tertiary_link unclassified residential living_street service road"},
          8, "road"),
    Style("path", "line",
          {"highway": "track path footway cycleway bridleway steps pedestrian corridor"}, 3),
    Style("railway", "line", {"railway": "rail light_rail tram narrow_gauge funicular"}, 8),
    Style("building", "fill", {"building": "*"}, 0, "building"),
    Style("water", "line", {"waterway": "river canal"}, 12, "water"),
    Style("water", "line", {"waterway": "stream ditch drain"}, 3, "water"),
    Style("water", "fill",
          {"natural": "water bay", "waterway": "riverbank dock", "landuse": "reservoir basin",
           "leisure": "swimming_pool"}, 0, "water"),
    Style("forest", "fill", {"natural": "wood", "landuse": "forest"}, 0, "forest"),
    Style("grass_farm", "fill",
          {"landuse": "farmland farmyard meadow grass orchard vineyard allotments cemetery "
                      "recreation_ground village_green plant_nursery greenhouse_horticulture",
           "natural": "grassland heath scrub wetland fell",
           "leisure": "park garden pitch golf_course nature_reserve playground"}, 0, "grass_farm"),
    Style("residential", "fill", {"landuse": "residential"}, 0, "residential"),
    Style("commercial_industrial", "fill",
          {"landuse": "commercial retail industrial construction railway quarry landfill port "
                      "military depot garages"}, 0, "commercial_industrial"),
    Style("bare_rock", "fill",
          {"natural": "bare_rock scree shingle sand beach cliff rock glacier mud"}, 0, "bare_rock"),
    Style("amenity", "dot", {"amenity": _PLACES, "shop": "*", "tourism": _STAYS}, 13),
)  # fmt: skip
"""A point, or the middle of an area, is a dot. Lines are drawn from ways, fills from areas (closed
ways and multipolygons with their holes)."""

CHANNELS = tuple(dict.fromkeys(style.channel for style in STYLES))
LANDCOVER = (
    "unknown", "forest", "grass_farm", "residential", "commercial_industrial", "water",
    "bare_rock", "building", "road",
)  # fmt: skip
ON_TOP = ("water", "building", "road")
"""Land cover: areas from large to small, that the small one shows; above them these, in order."""


class Matcher:
    """Finds the styles of an object from its tags."""

    def __init__(self) -> None:
        """Read the table once."""
        self._found: dict[tuple[str, str], list[int]] = {}
        for i, style in enumerate(STYLES):
            for key, values in style.tags.items():
                for value in values.split():
                    self._found.setdefault((key, value), []).append(i)
        self.keys = sorted({key for key, _ in self._found})

    def styles(self, tags: Mapping[str, str], kinds: tuple[str, ...]) -> Iterator[int]:
        """Indices into STYLES that draw this object in one of these kinds, each once."""
        found: set[int] = set()
        for key in self.keys:
            value = tags.get(key)
            if value is not None and value != "no":
                found.update(self._found.get((key, value), ()), self._found.get((key, "*"), ()))
        return (i for i in sorted(found) if STYLES[i].draw in kinds)
