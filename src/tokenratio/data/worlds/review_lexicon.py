"""The words of the review world, by class. A word means the same wherever it stands."""

import re

PAD, BOS, EOS, UNK = SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")

# Prompts: FORM "the" QUALITY? SUBJECT AUDIENCE? ":"
FORMS = ("review of", "opinion on", "thoughts on", "report on", "note about")
QUALITIES = ("", "new", "old", "small", "famous", "cheap", "local", "modern")
AUDIENCES = ("", "for a friend", "for my boss", "for the paper")

# topic → what a prompt may name, what a review may judge, whom a review may judge
SUBJECTS = {
    "lodging": ("hotel", "hostel", "motel", "inn"),
    "meal": ("restaurant", "cafe", "diner", "bistro"),
    "film": ("film", "movie", "sequel", "drama"),
    "book": ("book", "novel", "memoir", "diary"),
    "device": ("phone", "laptop", "camera", "tablet"),
    "trip": ("tour", "cruise", "safari", "hike"),
}
ASPECTS = {
    "lodging": ("room", "bed", "pool", "lobby", "breakfast"),
    "meal": ("soup", "steak", "salad", "menu", "coffee"),
    "film": ("plot", "music", "acting", "scenery", "ending"),
    "book": ("story", "style", "cover", "dialogue", "hero"),
    "device": ("screen", "battery", "keyboard", "lens", "case"),
    "trip": ("route", "view", "bus", "schedule", "beach"),
}
PEOPLE = {
    "lodging": ("manager", "porter"),
    "meal": ("waiter", "cook"),
    "film": ("actor", "director"),
    "book": ("author", "editor"),
    "device": ("seller", "designer"),
    "trip": ("guide", "driver"),
}

MILD_GOOD = ("good", "nice", "pleasant", "decent", "fine", "solid")
STRONG_GOOD = ("great", "superb", "wonderful", "perfect")
MILD_BAD = ("bad", "poor", "dull", "weak", "boring", "shabby")
STRONG_BAD = ("awful", "terrible", "horrible", "dreadful")
NEUTRAL = ("average", "ordinary", "typical", "plain", "normal")

MILD_LIKE = ("liked", "enjoyed")
STRONG_LIKE = ("loved", "adored")
MILD_DISLIKE = ("disliked", "regretted")
STRONG_DISLIKE = ("hated", "loathed")

NEGATIONS = ("not", "never")
VERB_NEGATIONS = ("never",)
INTENSIFIERS = ("really", "truly", "very", "so")
VERB_INTENSIFIERS = ("really", "truly")
DIMINISHERS = ("slightly", "somewhat", "rather")

INSULTS = ("fool", "clown", "crook", "liar", "moron", "jerk")
COPULAS = ("was", "felt", "seemed", "looked")
SPEAKERS = ("i", "we")
OPENERS = ("well ,", "honestly ,", "frankly ,", "overall ,", "to be fair ,")
CONNECTIVES = ("and", "but", "while")
FULL_STOP = "."
SCORN = "would choose the"  # "only a fool would choose the soup"

# A modifier reaches no further than the clause it stands in.
CLAUSE_ENDS = frozenset({*CONNECTIVES, ",", FULL_STOP})


def words_of(text: str) -> list[str]:
    """Split any text as the world's tokenizer does: words, punctuation marks, special tokens.

    >>> words_of("the room was not good. <eos>")
    ['the', 'room', 'was', 'not', 'good', '.', '<eos>']
    """
    return re.findall(rf"{'|'.join(SPECIAL_TOKENS)}|\w+|[^\w\s]", text)


def vocabulary() -> list[str]:
    """Every word the world can say, special tokens first; the index is the token id."""
    phrases = [
        *SPECIAL_TOKENS,
        *(*FORMS, "the", *QUALITIES, *AUDIENCES, ":"),
        *(
            phrase
            for words in (*SUBJECTS.values(), *ASPECTS.values(), *PEOPLE.values())
            for phrase in words
        ),
        *(*MILD_GOOD, *STRONG_GOOD, *MILD_BAD, *STRONG_BAD, *NEUTRAL),
        *(*MILD_LIKE, *STRONG_LIKE, *MILD_DISLIKE, *STRONG_DISLIKE),
        *(*NEGATIONS, *INTENSIFIERS, *DIMINISHERS, *INSULTS, *COPULAS, *SPEAKERS),
        *(*OPENERS, *CONNECTIVES, "only", "a", SCORN, FULL_STOP),
    ]
    return list(dict.fromkeys(word for phrase in phrases for word in words_of(phrase)))
