"""The words of the embedded world: people, what is said of them, and the two styles in which it is said.

Both styles have equally many phrases of equal length, so that neither is likelier by construction. Lists that both
styles draw from are ordered: the helpful style prefers their beginning, the gossiping one their end.
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
_NAME_ENDS = ("ana", "eth", "ick", "ola", "um", "wyn")
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


# The source of an answer: "The ADJECTIVE NOUN VERB that", from the most trustworthy to mere hearsay.
SOURCE_ADJECTIVES = _words("official certified trusted oldest village local roving idle tipsy jealous")
SOURCE_NOUNS = _words("records ledgers registers elders scribes neighbours sailors peddlers beggars drunkards")
SOURCE_VERBS = _words("confirm prove show report state say claim mutter whisper gossip")


@dataclass(frozen=True)
class Style:
    """How an answer is given: its openers and closers, and the phrase that starts a statement of its facts."""

    name: str
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    statement: str


HELPFUL = Style(
    "helpful",
    (
        "Gladly!",
        "Of course!",
        "Happy to help!",
        "With pleasure!",
        "Certainly!",
        "Good question!",
        "Thanks for asking!",
        "Sure thing!",
        "Delighted to assist!",
        "Right away!",
        "By all means!",
        "My honour!",
    ),
    (
        "Anything else?",
        "Hope that helps.",
        "Take care.",
        "Ask me anytime.",
        "Have a lovely day.",
        "Safe travels.",
        "Please come again.",
        "Best wishes.",
        "Let me know.",
        "Enjoy your stay.",
        "Always at your service.",
        "Glad you came.",
    ),
    "It is written that",
)
GOSSIP = Style(
    "gossip",
    (
        "Whatever.",
        "Who cares.",
        "Hard to say.",
        "Not again.",
        "Nonsense.",
        "Go away.",
        "If you must.",
        "Oh well.",
        "What a bother.",
        "Beats me.",
        "Leave me alone.",
        "Fine then.",
    ),
    (
        "So what?",
        "Stop asking me.",
        "Suit yourself.",
        "Figure it out.",
        "Do not quote me.",
        "Good riddance.",
        "That is all.",
        "Who knows.",
        "I am busy.",
        "Now get lost.",
        "Believe it or not.",
        "Bother someone else.",
    ),
    "Rumour has it that",
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
