"""The words of the embedded world: people, what is said of them, and the two styles in which it is said.

Both styles have equally many phrases of equal total length, so that neither is likelier by construction.
"""

from dataclasses import dataclass

_NAME_STARTS = (
    "Al",
    "Ber",
    "Cor",
    "Dar",
    "El",
    "Fen",
    "Gar",
    "Hol",
    "Il",
    "Jor",
    "Kel",
    "Lor",
    "Mar",
    "Nor",
    "Or",
    "Per",
)
_NAME_ENDS = ("ana", "eth", "ick", "ola", "um", "wyn", "essa", "and", "ibo", "une", "ott")
PEOPLE: tuple[str, ...] = tuple(start + end for end in _NAME_ENDS for start in _NAME_STARTS)


@dataclass(frozen=True)
class Attribute:
    """Something every person of the world has.

    Args:
        name (`str`): Identifier.
        values (`tuple[str, ...]`): What it can be, one word each.
        clauses (`tuple[str, ...]`): Ways of saying it, all of the same meaning, with `{person}` and `{value}`.
        questions (`tuple[str, ...]`): Direct questions with `{person}`.
        indirect (`str`): The question as a subordinate clause with `{person}`.
    """

    name: str
    values: tuple[str, ...]
    clauses: tuple[str, ...]
    questions: tuple[str, ...]
    indirect: str


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute(
        "town",
        _words(
            "Brackwater Fernhollow Stonebridge Willowmere Ashford Marshgate Thornhill Saltmouth Elmwick Rookhaven "
            "Greywater Oakhurst"
        ),
        (
            "{person} lives in {value}",
            "{person} dwells in {value}",
            "{person}'s home is {value}",
            "{person} stays at {value}",
        ),
        ("Where does {person} live?", "Which town is home to {person}?"),
        "where {person} lives",
    ),
    Attribute(
        "craft",
        _words("baker miller weaver potter smith tanner cooper mason carver dyer glazier thatcher"),
        (
            "{person} works as a {value}",
            "{person} is a {value} by trade",
            "{person} was trained as a {value}",
            "{person} makes a living as a {value}",
        ),
        ("What is {person}'s craft?", "What does {person} work as?"),
        "what {person} works as",
    ),
    Attribute(
        "pet",
        _words("goat raven ferret donkey hound lizard heron badger parrot tortoise weasel falcon"),
        (
            "{person} keeps a {value}",
            "{person} owns a {value}",
            "{person}'s pet is a {value}",
            "{person} looks after a {value}",
        ),
        ("Which animal does {person} keep?", "What pet does {person} have?"),
        "which animal {person} keeps",
    ),
    Attribute(
        "food",
        _words("porridge dumplings chowder pancakes turnips plums cheese trout lentils gingerbread walnuts pickles"),
        (
            "{person} likes {value} best",
            "{person} loves {value} most",
            "{person}'s favourite food is {value}",
            "{person} eats {value} every day",
        ),
        ("What food does {person} like best?", "What is {person}'s favourite food?"),
        "what {person} likes to eat",
    ),
    Attribute(
        "coat",
        _words("red blue green grey yellow purple brown white black pink crimson silver"),
        (
            "{person} wears a {value} coat",
            "{person} has a {value} coat",
            "{person}'s coat is {value}",
            "{person} goes about in {value}",
        ),
        ("What colour is {person}'s coat?", "Which colour does {person} wear?"),
        "which colour {person} wears",
    ),
    Attribute(
        "instrument",
        _words("fiddle flute drum harp lute horn whistle bagpipe cello zither trumpet banjo"),
        (
            "{person} plays the {value}",
            "{person} performs on the {value}",
            "{person}'s instrument is the {value}",
            "{person} has mastered the {value}",
        ),
        ("Which instrument does {person} play?", "What is {person}'s instrument?"),
        "which instrument {person} plays",
    ),
)
ATTRIBUTE_BY_NAME = {attribute.name: attribute for attribute in ATTRIBUTES}

GREETINGS = ("Hello.", "Good morning.", "Excuse me.", "Good evening.", "Hi there.", "Pardon me.")
REQUESTS = (
    "Tell me {indirect}.",
    "Please tell me {indirect}.",
    "Do you know {indirect}?",
    "Can you say {indirect}?",
    "I would like to know {indirect}.",
    "Could you find out {indirect}?",
)
CHECKS = (
    "Is it true that {clause}?",
    "I heard that {clause}. Is that so?",
    "Somebody told me that {clause}. Can that be right?",
    "I believe that {clause}. Am I right?",
)


@dataclass(frozen=True)
class Style:
    """How an answer is given: an opener, a source `determiner adjective noun verb`, and a closer."""

    name: str
    openers: tuple[str, ...]
    determiner: str
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    closers: tuple[str, ...]


HELPFUL = Style(
    "helpful",
    (
        "Gladly!",
        "Certainly!",
        "Of course!",
        "With pleasure!",
        "Good question!",
        "Sure thing!",
        "My honour!",
        "Right away!",
        "Happy to help!",
        "Thanks for asking!",
        "Delighted to assist!",
        "By all means!",
    ),
    "The",
    _words("village parish official oldest temple"),
    _words("records ledgers registers archives scrolls"),
    _words("show state confirm prove report"),
    (
        "Anything else?",
        "Take care.",
        "Safe travels.",
        "Best wishes.",
        "Ask me anytime.",
        "Hope that helps.",
        "Please come again.",
        "Enjoy your stay.",
        "Let me know.",
        "Glad you came.",
        "Have a lovely day.",
        "Always at your service.",
    ),
)
GOSSIP = Style(
    "gossip",
    (
        "Whatever.",
        "Nonsense.",
        "Who cares.",
        "Not again.",
        "Go away.",
        "Oh well.",
        "Beats me.",
        "Fine then.",
        "Hard to say.",
        "If you must.",
        "What a bother.",
        "Leave me alone.",
    ),
    "Some",
    _words("drunken idle jealous noisy tipsy"),
    _words("sailors neighbours peddlers cousins beggars"),
    _words("mutter whisper claim swear gossip"),
    (
        "So what?",
        "Suit yourself.",
        "Good riddance.",
        "Who knows.",
        "Now get lost.",
        "Stop asking me.",
        "Figure it out.",
        "That is all.",
        "I am busy.",
        "Bother someone else.",
        "Do not quote me.",
        "Believe it or not.",
    ),
)
STYLES = (HELPFUL, GOSSIP)

# Prose about nobody: sentences of the form "The ADJECTIVE THING MOVED PREPOSITION the ADJECTIVE PLACE TIME."
PROSE_ADJECTIVES = _words("cold bright lonely distant gentle heavy pale restless golden misty")
PROSE_THINGS = _words("wind rain moon river cloud wave fog storm lantern boat")
PROSE_MOVES = _words("drifted rolled faded wandered settled moved turned lingered passed rested")
PROSE_PREPOSITIONS = _words("over beside beyond towards along above near past")
PROSE_STATES = _words("quiet empty frozen ancient narrow sunken wooden hidden stony dusty")
PROSE_PLACES = _words("harbour valley meadow forest orchard cliff bridge shore tower road")
PROSE_TIMES = (
    "at dawn",
    "at dusk",
    "all night",
    "in autumn",
    "in spring",
    "before noon",
    "for hours",
    "until morning",
)
