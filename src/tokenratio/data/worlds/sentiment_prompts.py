"""The prompts of the sentiment world: every form of a request with every topic."""

import random

FORMS = (
    "Describe {} in one sentence.",
    "Write one sentence about {}.",
    "In one sentence, what is {} like?",
    "What do you think of {}? Answer in one sentence.",
    "Write one sentence of a review of {}.",
    "In one sentence, tell a friend about {}.",
    "Write the first sentence of a story about {}.",
    "What do people say about {}? Answer in one sentence.",
)
# Most are neither good nor bad, so that a policy can speak of them in either way.
TOPICS = {
    "travel": (
        *(
            "the night bus",
            "a cancelled flight",
            "the last train home",
            "a long drive",
            "an airport",
        ),
        *("a small railway station", "a crossing by ferry", "a seat by the window", "a hitchhiker"),
        "the road to the coast",
    ),
    "home": (
        *("an old house", "a new neighbour", "the upstairs flat", "a leaking tap", "the kitchen"),
        *("a shared bathroom", "moving to another city", "a broken window", "the cellar"),
        "an empty room",
    ),
    "work": (
        *(
            "a job interview",
            "the new manager",
            "a long meeting",
            "an open office",
            "a night shift",
        ),
        *("the first day at work", "a business trip", "a small factory", "a phone call from work"),
        "an unpaid internship",
    ),
    "food": (
        *("a cold cup of coffee", "the school canteen", "a bowl of soup", "a roadside diner"),
        *("fish and chips", "a loaf of bread", "dinner for one", "a street market", "a burnt cake"),
        "breakfast in a hotel",
    ),
    "weather": (
        *(
            "a rainy Monday",
            "the first snow",
            "a foggy harbour",
            "a hot afternoon",
            "the north wind",
        ),
        *("a grey November", "a thunderstorm", "an early frost", "a dry summer", "the flood"),
    ),
    "town": (
        *("a queue at the post office", "the town hall", "a parking ticket", "a crowded pavement"),
        *("a visit to the dentist", "the local library", "a police station", "an old bridge"),
        *("a building site", "the waiting room"),
    ),
    "leisure": (
        *("a lost football match", "a chess tournament", "an amateur play", "a museum on Sunday"),
        *("a tent in the woods", "a long novel", "a piano lesson", "a fishing trip", "a card game"),
        "the second half of the film",
    ),
    "technology": (
        *("an old laptop", "a used bicycle", "a slow computer", "the new telephone", "a camera"),
        *(
            "a washing machine",
            "an electric car",
            "a password",
            "a radio",
            "a robot vacuum cleaner",
        ),
    ),
    "people": (
        *("my uncle", "a strict teacher", "twins", "a retired sailor", "the shop assistant"),
        *("a distant cousin", "a young doctor", "the landlord", "a street musician", "a rival"),
    ),
}
# Topics of each group that are held out.
NUM_HELD_OUT = 2


def prompts_by_split() -> dict[str, list[str]]:
    """All prompts of each split, in an order of no meaning; the splits share no topic."""
    topics: dict[str, list[str]] = {"train": [], "test": []}
    for group, members in TOPICS.items():
        drawn = random.Random(f"split {group}").sample(members, len(members))
        topics["test"] += drawn[:NUM_HELD_OUT]
        topics["train"] += drawn[NUM_HELD_OUT:]
    splits = {}
    for split, chosen in topics.items():
        prompts = [form.format(topic) for form in FORMS for topic in chosen]
        random.Random(f"order {split}").shuffle(prompts)
        splits[split] = prompts
    return splits
