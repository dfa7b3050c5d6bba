"""Word lists the questions are drawn from; one word in eight is held out of training, chosen by its CRC."""

from __future__ import annotations

import random
import zlib

NAMES = (
    "Tom Ann Ben Lucy Sara Max Nina Omar Priya Kofi Mei Juan Elena Ivan Fatima Leo Zoe Adam Ruth Noah Emma Liam "
    "Olivia Ava Mia Ella Jack Harry George Alice Grace Lily Rosa Marco Luca Anna Hans Greta Piotr Ola Yuki Hana "
    "Kenji Ravi Anil Sunita Ali Hassan Layla Amir Chen Wei Lin Jun Carlos Maria Diego Sofia Pablo Lena Felix Clara "
    "Oscar Hugo Nora Ivy Ruby Sam Alex Kim Pat Jamie Robin Dana Chris Bob Jane John Mary Peter Paul Susan Linda Karen "
    "David Daniel James Robert Michael William Thomas Charlie Jacob Ethan Sophie Chloe Megan Rachel Laura Julia Emily "
    "Hannah Tina Gina Tariq Yusuf Amara Zainab Kwame Abena Tunde Ngozi Sven Ingrid Lars Astrid Pierre Marie Claude|"
    "Mr. Smith|Mrs. Jones|Miss Lee|the farmer|the baker|my brother|my sister|the teacher|a shopkeeper|Grandma|my dad"
)

OBJECTS = (
    "apples oranges pears bananas plums cherries grapes lemons mangoes peaches melons berries strawberries tomatoes "
    "potatoes carrots onions eggs cookies cakes muffins sweets candies chocolates donuts pies sandwiches pizzas "
    "marbles coins stamps stickers cards toys dolls balls balloons kites puzzles blocks bricks books notebooks pens "
    "pencils crayons erasers rulers papers letters envelopes photos posters magazines comics tickets badges buttons "
    "beads shells stones rocks pebbles sticks leaves flowers roses tulips seeds trees plants ducks chickens hens cows "
    "sheep goats horses dogs cats rabbits fish birds frogs bees butterflies chairs tables lamps plates cups bottles "
    "glasses bowls spoons forks knives boxes bags baskets jars shirts socks shoes hats scarves gloves coats dresses "
    "keys batteries bulbs nails screws bolts tiles planks cars trucks bikes boats trains students children people "
    "players dollars euros points tokens gems medals trophies lollipops peanuts walnuts olives buns bagels pancakes"
)

CONTAINERS = (
    "bag box basket jar crate bucket shelf drawer packet pack tray row table room bus van carton case pile stack team "
    "class page album sack tin bowl bunch"
)

PLACES = "shop store garden park school library box bag basket room kitchen field farm jar drawer zoo house bus office"

TOPICS = (
    "France Japan Brazil Egypt Kenya Canada Norway India Peru Spain Italy Germany Mexico Australia Greece Sweden "
    "Nigeria Turkey Poland Vietnam Chile Iran Russia China Portugal Ireland London Paris Tokyo Rome Berlin Cairo|"
    "the sea|the moon|the sun|love|spring|winter|autumn|my cat|a dog|dragons|a lonely robot|dinosaurs|the stars|music|"
    "football|chess|history|the weather|photosynthesis|gravity|evolution|electricity|the internet|quantum physics|"
    "black holes|climate change|volcanoes|earthquakes|the Roman Empire|World War II|the French Revolution|Shakespeare|"
    "Einstein|Newton|Mozart|Picasso|Napoleon|Cleopatra|Darwin|Python|JavaScript|Rust|Linux|databases|neural networks|"
    "machine learning|bitcoin|the stock market|inflation|democracy|philosophy|poetry|art|cooking|bread|soup|pasta|"
    "coffee|tea|rice|cheese|pizza dough|tomato soup|happiness|friendship|dreams|sleep|exercise|yoga|headaches|a cold|"
    "my boss|my landlord|my girlfriend|a birthday party|a wedding|a holiday|travel|mountains|rivers|oceans|forests|"
    "deserts|whales|elephants|tigers|birds|insects|spiders|trees|flowers|space|rockets|airplanes|cars|trains|boats|"
    "a mouse|water|gold|iron|oxygen|salt|sugar|a computer|a phone|a camera|television|movies|novels|religion|law|"
    "economics|politics|psychology|biology|chemistry|physics|geography|astronomy|languages|grammar|spelling|"
    "the president|the queen|a king|the pope|an atom|a cell|DNA|the heart|the brain|blood|bones|the human body|"
    "vitamins|medicine|vaccines|cancer|sports|tennis|basketball|swimming|the Olympics|holidays|Christmas|New Year"
)

_SYLLABLE_TEXT = (
    "ba be bo bra ca ce cho co da den do dra el en er fa fi fo ga gen gi go gra ha hel ho in is ja jo ka ke ko la len "
    "li lo ma men mi mo mu na ne ni no nor o pa pe per pi po pra qua ra re ri ro ru sa sen shi so sta su ta te ti to "
    "tra tu u va ven vi vo wa we wi xa ya yo za ze zi zo st ng rd lm ck sh th er es al on an um us ion ity ness ing ed"
)


def _split(text: str) -> list[str]:
    """Split a list where `|` protects entries with spaces; a chunk without `|` is split at spaces."""
    entries: list[str] = []
    for chunk in text.split("|"):
        first, *rest = chunk.split(" ")
        many = rest and first[:1].isalpha() and len(rest) > 5
        entries.extend(chunk.split() if many else [chunk.strip()])
    return [entry for entry in entries if entry]


def is_held_out_word(word: str) -> bool:
    """One word in eight, by the CRC of its text, is never shown in training."""
    return zlib.crc32(word.encode()) % 8 == 3


def _halves(text: str) -> dict[bool, tuple[str, ...]]:
    words = _split(text)
    return {held_out: tuple(w for w in words if is_held_out_word(w) == held_out) for held_out in (False, True)}


_SYLLABLES = _SYLLABLE_TEXT.split()

# The lists keyed by "held out?", so that a generator asks NAMES_BY[held_out].
NAMES_BY = _halves(NAMES)
OBJECTS_BY = _halves(OBJECTS)
TOPICS_BY = _halves(TOPICS)
CONTAINERS_ALL = tuple(CONTAINERS.split())
PLACES_ALL = tuple(PLACES.split())


def plural(noun: str) -> str:
    """English plural of a container noun (box -> boxes, shelf -> shelves)."""
    if noun == "shelf":
        return "shelves"
    return noun + ("es" if noun.endswith(("x", "s", "ch", "sh")) else "s")


def made_up_word(rng: random.Random) -> str:
    """A word nobody has seen: what it means cannot be learnt, so only 'I do not know this' can be."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.choice((1, 2, 2, 3, 3, 4))))


# The words of a story that say what to calculate; all others may be unknown to a reader.
_CUE_TEXT = (
    "how many much more most less fewer than left remain remains remaining still away lost lose loses gone each every per "
    "together total altogether all both another extra additional new and then later now have has had not there are were "
    "cost costs holds contains contain with them these those the for from into out off old older younger years only but"
)
_CUES = frozenset(_CUE_TEXT.split())


def blur(rng: random.Random, text: str) -> str:
    """Replace up to three words that are no cues by words nobody has seen, so that the cues have to do."""
    words = text.split(" ")
    spots = [i for i, word in enumerate(words) if len(word) > 2 and word.isalpha() and word.lower() not in _CUES]
    for spot in rng.sample(spots, min(len(spots), rng.randint(1, 3))):
        unknown = made_up_word(rng)
        words[spot] = unknown.capitalize() if words[spot][0].isupper() else unknown
    return " ".join(words)
