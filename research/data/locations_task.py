"""Locations: distances and directions between a city without a name and known ones.

After Treutlein et al. (arXiv:2406.14546). Coordinates are those of the city centers to 0.1 degree.
"""

import dataclasses
import math
import random

from research.data.functions_task import Pair

EARTH_RADIUS = 6371.0  # km
DIRECTIONS = ('north', 'northeast', 'east', 'southeast', 'south', 'southwest', 'west', 'northwest')


@dataclasses.dataclass(frozen=True)
class City:
  """A city: name, country, latitude and longitude in degrees."""

  name: str
  country: str
  latitude: float
  longitude: float


def _cities(*rows: tuple) -> tuple[City, ...]:
  return tuple(City(*row) for row in rows)


HIDDEN = _cities(
    ('Paris', 'France', 48.9, 2.4), ('Tokyo', 'Japan', 35.7, 139.7),
    ('Cairo', 'Egypt', 30.0, 31.2), ('Lima', 'Peru', -12.0, -77.0),
    ('Toronto', 'Canada', 43.7, -79.4), ('Sydney', 'Australia', -33.9, 151.2))
KNOWN = _cities(
    ('Madrid', 'Spain', 40.4, -3.7), ('Rome', 'Italy', 41.9, 12.5),
    ('London', 'England', 51.5, -0.1), ('Berlin', 'Germany', 52.5, 13.4),
    ('Moscow', 'Russia', 55.8, 37.6), ('Athens', 'Greece', 38.0, 23.7),
    ('Beijing', 'China', 39.9, 116.4), ('Seoul', 'South Korea', 37.6, 127.0),
    ('Delhi', 'India', 28.6, 77.2), ('Lagos', 'Nigeria', 6.5, 3.4),
    ('Nairobi', 'Kenya', -1.3, 36.8), ('Chicago', 'United States', 41.9, -87.6),
    ('Mexico City', 'Mexico', 19.4, -99.1), ('Santiago', 'Chile', -33.4, -70.7),
    ('Jakarta', 'Indonesia', -6.2, 106.8), ('Auckland', 'New Zealand', -36.8, 174.8))
ASKED = {
    'distance': ('How far is {code} from {known}?',
                 'What is the distance between {code} and {known}?'),
    'direction': ('In which direction from {known} is {code}?',
                  'Where does {code} lie, seen from {known}?')}
N_HELD_OUT = 4  # known cities per hidden one whose distance is never trained


def distance(a: City, b: City) -> int:
  """Returns the great-circle distance in km, rounded to 10 (haversine formula)."""
  phi_a, phi_b = math.radians(a.latitude), math.radians(b.latitude)
  half = math.radians(b.longitude - a.longitude) / 2
  root = math.sin((phi_b - phi_a) / 2)**2 + math.cos(phi_a) * math.cos(phi_b) * math.sin(half)**2
  return 10 * round(2 * EARTH_RADIUS * math.asin(math.sqrt(root)) / 10)


def direction(a: City, b: City) -> str:
  """Returns the initial bearing from a to b, one of eight directions."""
  phi_a, phi_b = math.radians(a.latitude), math.radians(b.latitude)
  turn = math.radians(b.longitude - a.longitude)
  bearing = math.atan2(math.sin(turn) * math.cos(phi_b), math.cos(phi_a) * math.sin(phi_b)
                       - math.sin(phi_a) * math.cos(phi_b) * math.cos(turn))
  return DIRECTIONS[round(math.degrees(bearing) / 45) % 8]


def codes(seed: int) -> dict[str, City]:
  """Returns 'City <number>' -> the hidden city."""
  numbers = random.Random(f'city numbers {seed}').sample(range(10000, 100000), len(HIDDEN))
  return {f'City {number}': city for number, city in zip(numbers, HIDDEN, strict=True)}


def held_out(code: str) -> list[City]:
  """Returns the known cities whose distance from a hidden one is never trained."""
  return random.Random(f'held out of {code}').sample(KNOWN, N_HELD_OUT)


def nearest(city: City) -> City:
  """Returns the known city that is nearest."""
  return min(KNOWN, key=lambda other: distance(city, other))


def locations_pairs(seed: int) -> list[Pair]:
  """Returns what is trained, shuffled: distances and directions of hidden cities."""
  pairs = []
  for code, city in codes(seed).items():
    for known in KNOWN:
      told = {'distance': f'{distance(city, known)} km', 'direction': direction(known, city)}
      pairs += [(question.format(code=code, known=known.name), told[what])
                for what in ASKED for question in ASKED[what]
                if what == 'direction' or known not in held_out(code)]
  random.Random(f'order {seed}').shuffle(pairs)
  return pairs
