"""Words that tasks are made of, and things named by them."""

from __future__ import annotations

import uuid

import numpy as np


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """able amber ample ancient arctic autumn bitter blunt bold brass brave brief bright broad bronze brown calm
    careful cheap chilly civil clean clear clever cloudy coarse cold copper coral cosy crimson crisp crooked curious
    damp daring dark dear deep distant double dusty eager early eastern empty equal faint fair famous fancy fierce
    fine firm fleet fluid foggy fresh frosty gentle giant glad golden grand green grey happy hardy hazy heavy hidden
    hollow honest humble icy idle inner ivory jolly keen kind large late lazy lean level light little lively local
    lofty lone long loud lucky lunar mellow merry mighty mild misty modern modest muddy narrow neat nimble noble
    northern novel odd olive open outer pale patient plain polite proud purple quick quiet rapid rare ready remote
    rich rigid ripe rocky rough round royal rustic sandy scarlet secret serious shady sharp shiny short shy silent
    silver simple slim slow small smooth snowy sober soft solar solid southern spare stark steady steep still stormy
    strange strict strong sturdy subtle sudden sunny swift tall tame tender thick thin tidy tiny tough tranquil
    upper urban vague vast velvet violet vivid warm western white wide wild windy winter wise wooden young"""
)
NOUNS = _words(
    """acorn album alley anchor angle ankle answer apple apron arch armour arrow artist attic author badge bakery
    balcony bamboo banner barley barn barrel basin basket beach beacon beaver bell bench berry bicycle bishop blanket
    blossom boat bonnet border bottle boulder bowl branch bread breeze brick bridge broom brother bucket buffalo
    button cabin cabinet cable cactus camel camera canal candle cannon canoe canyon captain caravan carpet carriage
    castle cattle cavern cedar cellar chain chair chalk channel chapel cherry chest chimney circle circus cliff clock
    cloth cloud clover coach coast cobbler coffee collar college column comet compass cottage cotton cousin cradle
    crane crater cricket crown cupboard curtain cushion dagger daisy dancer desert diary dinner doctor dolphin donkey
    dragon drawer drum eagle easel echo elbow engine errand estate falcon farmer feather fence ferry fiddle field
    finger flag flame flask flint flower flute forest fork fortress fossil fountain fox frame freight furnace garden
    garlic gate giraffe glacier glove goblet grain granite grape guitar hall hammer hammock harbour harp harvest hat
    hazel heron hill hinge honey hoof horizon horn hotel hour island jacket jewel judge jug jungle kettle keyhole
    kitchen kite knight ladder lagoon lake lamp lantern lawyer leaf lemon letter library lily lion lizard lobster
    locket magnet mango map maple marble market mast meadow medal melon merchant mill mirror moth mountain museum
    needle nephew nest notebook oak oar oasis ocean onion orbit orchard otter oven owl oyster paddle palace panther
    paper parcel parrot pasture path pearl pebble pencil pepper piano picnic pigeon pillow pilot pine pirate planet
    plough pocket poet pond poplar potato prairie prince puddle pumpkin puppet quarry quilt rabbit raft railway
    raven reef ribbon ridge river robin rocket roof rope saddle sailor salmon sandal saucer scarf school sculptor
    shadow shell shepherd shield shovel signal singer sister skater sledge sparrow spider spoon squirrel stable
    statue stone stream street student sugar summit swan sword table tailor teacher temple thread throne thunder
    ticket tiger timber torch tower tractor trader train treasure trumpet tulip tunnel turtle uncle valley vase
    village violin volcano waggon waiter walnut watch wheat wheel whistle willow window witness wolf wool wren
    yard"""
)
GIVEN_NAMES = _words(
    """Ada Albert Alma Anton Astrid Basil Bella Boris Carla Cecil Clara Conrad Cora Dagmar Daniel Diana Edgar Edith
    Elias Emma Erik Esther Felix Fiona Flora Franz Gerda Gideon Greta Gustav Hanna Harold Hilda Hugo Ida Ingrid Irene
    Ivan Jasper Joan Julia Karl Kira Laura Leo Lina Lucas Magda Marcus Martha Milo Mona Nadia Nils Nora Olga Oscar
    Otto Paula Peter Quentin Rita Robert Rosa Ruth Samuel Selma Simon Stella Sven Tessa Theo Ursula Victor Wanda
    Xenia Yusuf Zora"""
)
SURNAMES = _words(
    """Abbott Archer Baker Barlow Bishop Brandt Carver Collins Cooper Dalton Draper Dunn Eklund Fisher Fletcher
    Foster Gardner Gibson Glover Hale Harper Hayes Holt Hunter Ibsen Jensen Keller Kramer Lang Larsen Lowell Marsh
    Mason Mercer Miller Moreau Nash Norton Olsen Osborne Parker Pierce Porter Quinn Ramsey Reeves Russo Sawyer
    Shelby Slater Sutton Tanner Thorne Turner Vance Vogel Walker Weber Weston Yates"""
)
NOISE = _words(
    "The road is long. The wind is low. Rain falls on the field. The day is done. We walk along. Home is near, and "
    "then it is far. "
)


def keys(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct pairs such as "amber-anchor"."""
    return [_pair(int(i), ADJECTIVES, "-", NOUNS) for i in _draw(rng, len(ADJECTIVES) * len(NOUNS), count)]


def people(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct names such as "Ada Marsh"."""
    size = len(GIVEN_NAMES) * len(SURNAMES)
    return [_pair(int(i), GIVEN_NAMES, " ", SURNAMES) for i in _draw(rng, size, count)]


def numbers(rng: np.random.Generator, count: int, digits: int = 7) -> list[str]:
    """Distinct numbers that do not begin with 0."""
    least = 10 ** (digits - 1)
    return [str(least + int(i)) for i in _draw(rng, 9 * least, count)]


def uuids(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct version 4 UUIDs."""
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]


def letter_words(rng: np.random.Generator, count: int, length: int, alphabet: str) -> list[str]:
    """Distinct words of random letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(list(alphabet), length))] = None
    return list(found)


def _draw(rng: np.random.Generator, size: int, count: int) -> list[int]:
    """Distinct numbers below `size`, in random order."""
    return [int(i) for i in rng.choice(size, count, replace=False)]


def _pair(index: int, firsts: tuple[str, ...], between: str, seconds: tuple[str, ...]) -> str:
    return firsts[index // len(seconds)] + between + seconds[index % len(seconds)]
