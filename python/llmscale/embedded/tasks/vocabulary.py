"""Word lists that several task families share: names, nouns, places, colours.

Plain data. Lists are ordered and never shuffled in place, so that a seed gives the same items on every machine.
Every list is in the tokenizer's training text, hence most words are a single token.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("""
    Anna Ben Clara David Emma Frank Grace Henry Ida Jack Kate Leo Maria Noah Olga Paul Rosa Sam Tina
    Victor Wendy Adam Bella Carl Diana Eric Fiona George Hannah Ivan Julia Karl Laura Max Nina Oscar
    Peter Ruth Simon Tom Lucy Mia Tim Lily Omar Sara
""")

CITIES = _words("""
    Paris London Berlin Rome Madrid Vienna Lisbon Oslo Prague Dublin Athens Cairo Tokyo Boston
    Chicago Denver Seattle Milan Geneva Munich Hamburg Venice Sydney Toronto Lima Delhi Nairobi
    Warsaw Helsinki Budapest
""")

JOBS = _words("""
    teacher doctor nurse baker farmer pilot driver painter singer writer lawyer cook gardener
    plumber engineer
""")

FRUITS = _words("""
    apple banana cherry date fig grape kiwi lemon mango olive orange peach pear plum
""")

ANIMALS = _words("""
    ant bear bee cat cow dog duck fish fox frog goat hen horse lion mouse owl pig rabbit sheep snake
    tiger wolf zebra
""")

OBJECTS = _words("""
    bag ball bell book boat box chair clock cup door hat key kite lamp map pen ring shoe spoon table
    tree train watch window
""")

COLOURS = _words("""
    black blue brown green grey orange pink purple red white yellow
""")

NATURE = _words("""
    cloud flower forest garden hill island lake moon mountain ocean rain river road sand sea snow
    star stone sun valley wind
""")

WORDS = tuple(sorted(set(FRUITS + ANIMALS + OBJECTS + COLOURS + NATURE)))
"""About 90 short words that sorting, spelling and repeating draw from."""
