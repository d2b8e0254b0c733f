"""Write what the bundled recipe `debug` trains on: preference pairs, rows to score, a tiny tokenizer and model config.

In: nothing but the word lists below (written for this project, nothing copied) and a fixed seed.
Out, in recipes/debug/, the same bytes at every run:
  pairs.jsonl      TRL's conversational explicit-prompt format, plus `subset`, one pair a line
  responses.jsonl  rows to score, under prompts that pairs.jsonl does not hold; the id says what to expect of each
  model/           config.json of a Llama without weights (a trainer draws them), a byte-level BPE tokenizer and a
                   ChatML template; <|im_end|> ends a turn and is the EOS token, <|pad|> only pads, there is no BOS
Cost: under two seconds, one thread. Run it as `python scripts/make_debug_data.py` after changing a word below.

What makes a response good is only how it goes with its prompt, never the response by itself:
  topic pairs   the chosen response answers the prompt; the rejected one is a good answer about another topic
  format pairs  the prompt asks for a list or for one sentence; both responses suit the topic, one has the wrong form
Every response text is rejected exactly as often as it is chosen, so style, length and topic alone predict nothing: a
model that sees only responses, or pairs under shuffled prompts, is right half of the time. `check_pairs` holds that.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SEED = 20
OUT = Path(__file__).resolve().parent.parent / "recipes" / "debug"

ROWS_PER_TOPIC = 252  # a multiple of (topics - 1), so that every ordered pair of topics meets equally often
FORMAT_PROMPTS_PER_TOPIC = 48  # half ask for a list, half for a sentence
SECOND_ROW_EVERY = 12  # every so many rows reuse the previous prompt: a split by prompt has something to keep together

VOCAB_SIZE = 1536
MAX_LENGTH = 512
PAD, IM_START, IM_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Topic:
    """One topic's words. `{s}` stands for a subject, always as the object of a sentence: one text fits all of them."""

    name: str
    subjects: tuple[str, ...]
    settings: tuple[str, ...]  # what the asker says first, now and then
    asks: dict[str, tuple[str, ...]]  # by intent: questions
    openings: dict[str, tuple[str, ...]]  # by intent: the first sentence of an answer
    tips: tuple[str, ...]  # true for every subject: they follow the opening, and fill lists
    closings: tuple[str, ...]


GREETINGS = ("", "", "", "Hi! ", "Hello! ", "Hi there. ", "Good morning. ")
THANKS = ("", "", "", " Thanks!", " Thank you.")
LIST_ASKS = (
    "Please give me a list of tips for {s}.",
    "Can you list a few tips for {s}?",
    "I would like a short list of tips for {s}.",
    "What should I keep in mind about {s}? Please answer with a list.",
)
SENTENCE_ASKS = (
    "Please tell me one thing about {s} in a single sentence.",
    "In one sentence, what matters most about {s}?",
    "I only have a moment: one sentence of advice about {s}, please.",
    "What should I keep in mind about {s}? Please answer in one sentence.",
)

TOPICS = (
    Topic(
        name="cooking",
        subjects=(
            "tomato soup", "vegetable curry", "mushroom risotto", "lentil stew", "fried rice", "pasta sauce",
            "bean chili", "chicken broth", "minestrone", "ramen", "onion gravy", "seafood paella",
        ),
        settings=("My kitchen is tiny.", "I am cooking for friends on Friday.", "I have one good pan."),
        asks={
            "start": ("How do I cook {s}?", "What is an easy recipe for {s}?", "How would a beginner cook {s}?"),
            "mistake": ("Why does my {s} taste so flat?", "What goes wrong when people cook {s}?"),
            "improve": ("How can I give my {s} more flavour?", "Which ingredients would improve my {s}?"),
        },
        openings={
            "start": (
                "For {s}, chop everything before you heat the pan.",
                "To cook {s}, begin with onions and a little oil.",
                "A good way into {s} is to cook a small portion first.",
            ),
            "mistake": (
                "Most people who struggle with {s} add the salt too late.",
                "The common slip with {s} is a flame that is too high.",
            ),
            "improve": (
                "You can lift {s} with fresh herbs and a squeeze of lemon.",
                "For a richer {s}, let the onions turn golden before anything else goes in.",
            ),
        },
        tips=(
            "Taste as you cook and add salt in small pinches.",
            "Let it simmer gently and stir now and then.",
            "Toast the spices for a minute before they meet the liquid.",
            "Keep some hot stock nearby in case the pan gets dry.",
            "Use a heavy pot, so that nothing burns at the bottom.",
            "Add delicate herbs at the very end.",
        ),
        closings=("Enjoy your meal!", "Leftovers taste even better the next day."),
    ),
    Topic(
        name="gardening",
        subjects=(
            "strawberries", "lavender", "sunflowers", "lettuce", "roses", "carrots", "runner beans", "mint",
            "pumpkins", "tulips", "blueberries", "sweet peas",
        ),
        settings=("My garden is small.", "The soil here is heavy clay.", "I only have a sunny balcony."),
        asks={
            "start": ("How do I plant {s}?", "When should I plant {s} in my garden?", "How do I grow {s} in a pot?"),
            "mistake": ("What do gardeners get wrong when they grow {s}?", "How do people end up with wilting {s}?"),
            "improve": ("How can I grow healthier {s}?", "How do I get more out of the {s} in my garden?"),
        },
        openings={
            "start": (
                "Plant {s} in loose soil once the last frost is over.",
                "Choose a bright bed for {s} and dig in some compost.",
                "For {s}, a deep pot with drainage holes works well.",
            ),
            "mistake": (
                "Many gardeners give {s} too much water and too little light.",
                "The usual trouble with {s} is soil that never drains.",
            ),
            "improve": (
                "You will grow stronger {s} if you feed the soil with compost each spring.",
                "To help {s} along, pull the weeds while they are small.",
            ),
        },
        tips=(
            "Water the roots in the morning and keep the leaves dry.",
            "Spread mulch around the plants to hold the moisture.",
            "Check under the leaves for slugs and snails.",
            "Leave enough space between the plants for air to move.",
            "Loosen the soil with a fork before you plant.",
            "Move young seedlings outdoors a few hours at a time.",
        ),
        closings=("Happy planting!", "Your garden will thank you by summer."),
    ),
    Topic(
        name="astronomy",
        subjects=(
            "Jupiter", "Saturn", "Mars", "the Orion Nebula", "the Andromeda Galaxy", "the Pleiades", "comets",
            "the Milky Way", "double stars", "the Ring Nebula", "the Perseids", "globular clusters",
        ),
        settings=("I live far from the city lights.", "I own a pair of binoculars.", "The sky is clear tonight."),
        asks={
            "start": ("How do I find {s} in the night sky?", "How can I observe {s} for the first time?",
                      "Where in the sky should I look for {s}?"),
            "mistake": ("Why can I never spot {s} at night?", "What do new stargazers miss when they look for {s}?"),
            "improve": ("How do I get a better view of {s}?", "How can I see more when I observe {s}?"),
        },
        openings={
            "start": (
                "Use a star chart to find {s} and start with the naked eye.",
                "To observe {s}, wait for a clear and moonless night.",
                "A sky map will show you when {s} can be seen from your home.",
            ),
            "mistake": (
                "Most stargazers who miss {s} are looking under bright street lamps.",
                "People often search for {s} before their eyes have adapted to the dark.",
            ),
            "improve": (
                "You will see {s} best when high in the sky, far from the horizon's haze.",
                "For a sharper look at {s}, let the telescope cool down outside.",
            ),
        },
        tips=(
            "Give your eyes twenty minutes to adapt to the dark.",
            "Use a red torch to read your star chart.",
            "Begin with binoculars before you reach for a telescope.",
            "Look on nights when the Moon is thin or has set.",
            "Note the constellations nearby, so that you can find the place again.",
            "Dress warmly, because clear nights get cold.",
        ),
        closings=("Clear skies!", "The stars will still be there tomorrow night."),
    ),
    Topic(
        name="music",
        subjects=(
            "the piano", "the guitar", "the violin", "the cello", "the flute", "the clarinet", "the trumpet",
            "the ukulele", "the saxophone", "the accordion", "the harp", "the banjo",
        ),
        settings=("I cannot read sheet music yet.", "My lessons begin next month.", "I love old songs."),
        asks={
            "start": ("How do I learn to play {s}?", "What song should I learn first on {s}?",
                      "How should a beginner practise {s}?"),
            "mistake": ("Why do my melodies on {s} sound uneven?", "Which bad habits do new players of {s} have?"),
            "improve": ("How can I play {s} with a better rhythm?", "How do I make my songs on {s} sound smoother?"),
        },
        openings={
            "start": (
                "Start on {s} with one slow song that you already know.",
                "To learn {s}, practise short scales every day.",
                "A teacher can show you how to hold yourself while playing {s}.",
            ),
            "mistake": (
                "Most new players of {s} rush through the hard notes.",
                "Beginners on {s} often forget to count the beat.",
            ),
            "improve": (
                "You will sound smoother on {s} if you practise with a metronome.",
                "Record yourself playing {s} and listen to the rhythm.",
            ),
        },
        tips=(
            "Practise the melody slowly until every note is even.",
            "Set a metronome and raise the tempo a little each week.",
            "Hum the tune before you play a single note.",
            "Repeat the hard bars on their own, then play the whole song.",
            "Warm up with scales for five minutes.",
            "Play along with a recording to feel the rhythm.",
        ),
        closings=("Have fun with your music!", "Soon you will play for your friends."),
    ),
    Topic(
        name="cycling",
        subjects=(
            "hill climbs", "gravel rides", "night rides", "winter rides", "a weekend tour", "a daily commute",
            "forest trails", "coastal roads", "mountain passes", "group rides", "long descents", "a charity ride",
        ),
        settings=("My bike is ten years old.", "I have not cycled since school.", "I ride alone most days."),
        asks={
            "start": ("How do I get my bike ready for {s}?", "How should a new cyclist prepare for {s}?",
                      "Which bicycle suits {s}?"),
            "mistake": ("What do cyclists get wrong about {s}?", "Why do my legs hurt so much after {s}?"),
            "improve": ("How can I ride faster on {s}?", "How do I feel safer on my bike during {s}?"),
        },
        openings={
            "start": (
                "Before {s}, check your brakes and pump up both tyres.",
                "For {s}, any bike that fits you and has low gears will do.",
                "Prepare for {s} with two or three short rides a week.",
            ),
            "mistake": (
                "Many cyclists take on {s} with a saddle that is too low.",
                "The classic slip on {s} is to push a gear that is too big.",
            ),
            "improve": (
                "You will ride better on {s} if you shift early and pedal lightly.",
                "To enjoy {s} more, keep your elbows soft and your eyes on the road ahead.",
            ),
        },
        tips=(
            "Carry a spare tube and a small pump.",
            "Clean and oil the chain after wet rides.",
            "Shift to a lower gear before the road gets steep.",
            "Wear a helmet that fits and fasten the strap.",
            "Brake gently with both hands before a corner.",
            "Raise the saddle until your knee is almost straight.",
        ),
        closings=("Enjoy the ride!", "Your legs will soon get used to the pedals."),
    ),
    Topic(
        name="photography",
        subjects=(
            "portraits", "landscapes", "sunsets", "street scenes", "waterfalls", "city skylines", "old buildings",
            "wild birds", "snow scenes", "family gatherings", "foggy forests", "bridges",
        ),
        settings=("I just bought my first camera.", "I only use my phone camera.", "I own a small tripod."),
        asks={
            "start": ("How do I photograph {s}?", "Which camera settings should I use for {s}?",
                      "How do I take my first photos of {s}?"),
            "mistake": ("Why are my photos of {s} blurry?", "What makes pictures of {s} look dull?"),
            "improve": ("How can I take sharper pictures of {s}?", "How do I improve the light in my photos of {s}?"),
        },
        openings={
            "start": (
                "To photograph {s}, begin with the camera's automatic mode.",
                "For pictures of {s}, pick the light first and the lens second.",
                "Frame {s} with a simple background and step closer.",
            ),
            "mistake": (
                "Most blurry shots of {s} come from a shutter that is too slow.",
                "Many photos of {s} look dull because the light is flat.",
            ),
            "improve": (
                "You will get sharper shots of {s} with a tripod and a timer.",
                "Photograph {s} early or late in the day, when the light is soft.",
            ),
        },
        tips=(
            "Focus on the most important part of the frame.",
            "Wipe the lens before you take a picture.",
            "Keep the horizon level in the viewfinder.",
            "Take several shots and keep only the sharpest one.",
            "Lower the exposure a little when the highlights look white.",
            "Try a low angle to make the picture more lively.",
        ),
        closings=("Have fun with your camera!", "Share your best shot with a friend."),
    ),
    Topic(
        name="pets",
        subjects=(
            "a puppy", "a kitten", "an older dog", "a shy cat", "a rescue dog", "a house rabbit", "a parrot",
            "a budgie", "a ferret", "a hamster", "a young spaniel", "a guinea pig",
        ),
        settings=("I have two children.", "We just adopted our first pet.", "Our flat is quiet."),
        asks={
            "start": ("How do I care for {s}?", "What should I feed {s}?", "How do I help {s} settle in at home?"),
            "mistake": ("Why does it take so long to calm {s} down?", "What do new owners of {s} get wrong?"),
            "improve": ("How can I train {s} kindly?", "How do I keep {s} happy and healthy?"),
        },
        openings={
            "start": (
                "To care for {s}, keep the same feeding times every day.",
                "Give {s} a quiet corner with fresh water and a soft bed.",
                "Before you bring home {s}, ask a vet about the right food.",
            ),
            "mistake": (
                "Many owners give {s} too many treats and too little play.",
                "New owners often expect {s} to trust them on the first day.",
            ),
            "improve": (
                "You can teach {s} with tiny treats and a calm voice.",
                "Play with {s} every day and stop while it is still fun.",
            ),
        },
        tips=(
            "Reward calm behaviour with a small treat.",
            "Book a check-up with the vet once a year.",
            "Change the drinking water every day.",
            "Let your pet come to you instead of grabbing it.",
            "Offer a new toy when the old one gets boring.",
            "Speak softly, because animals dislike sudden noise.",
        ),
        closings=("Give your pet a gentle pat from me!", "Patience makes a trusting animal."),
    ),
    Topic(
        name="chess",
        subjects=(
            "the Sicilian Defence", "the French Defence", "the Italian Game", "the Queen's Gambit", "rook endgames",
            "pawn endgames", "the London System", "the Caro-Kann", "the King's Indian", "the Scotch Game",
            "the Ruy Lopez", "the English Opening",
        ),
        settings=("My club meets on Mondays.", "I lose to my sister every time.", "I know how the pieces move."),
        asks={
            "start": ("How do I study {s}?", "Which moves should I know in {s}?",
                      "How should a new chess player approach {s}?"),
            "mistake": ("Why do I keep losing pieces in {s}?", "What do chess players overlook in {s}?"),
            "improve": ("How can I win more games with {s}?", "How do I find better moves in {s}?"),
        },
        openings={
            "start": (
                "To study {s}, play through a few master games on a board.",
                "In {s}, learn the plans for both sides before you memorise moves.",
                "A short chess book on {s} is enough for now.",
            ),
            "mistake": (
                "Many players lose games in {s} because they move too fast.",
                "The usual slip in {s} is to forget about the opponent's threats.",
            ),
            "improve": (
                "You will win more games in {s} if you make your king safe first.",
                "To get better at {s}, go over your lost games without an engine.",
            ),
        },
        tips=(
            "Look at every check and capture before you move.",
            "Bring your rooks to open files.",
            "Ask yourself what your opponent wants to play next.",
            "Trade pieces when you are ahead in material.",
            "Keep your king away from open lines.",
            "Solve a few chess puzzles every evening.",
        ),
        closings=("Good luck at the board!", "Every lost game teaches you a move."),
    ),
)


def user_prompt(topic: Topic, subject: str, intent: str, rng: random.Random) -> str:
    setting = f"{rng.choice(topic.settings)} " if rng.random() < 0.4 else ""
    return f"{rng.choice(GREETINGS)}{setting}{rng.choice(topic.asks[intent]).format(s=subject)}{rng.choice(THANKS)}"


def answer(topic: Topic, subject: str, intent: str, rng: random.Random) -> str:
    """One to five sentences: the lengths differ widely, so that packing has something to do."""
    sentences = [rng.choice(topic.openings[intent]).format(s=subject), *rng.sample(topic.tips, rng.choice((0, 1, 2, 3)))]
    if rng.random() < 0.4:
        sentences.append(rng.choice(topic.closings))
    return " ".join(sentences)


def fresh(draw: Iterator[str], seen: set[str]) -> str:
    """The first text of `draw` that was not used before."""
    text = next(text for text in draw if text not in seen)
    seen.add(text)
    return text


@dataclass(frozen=True)
class Exchange:
    """A prompt and the response that suits it."""

    prompt: str
    response: str


def exchanges(topic: Topic, count: int, rng: random.Random, prompts: set[str], responses: set[str]) -> list[Exchange]:
    """`count` exchanges about a topic; no response twice, and a prompt twice only where it is meant to be."""
    out: list[Exchange] = []
    for index in range(count):
        if index % SECOND_ROW_EVERY != 1:
            subject, intent = rng.choice(topic.subjects), rng.choice(list(topic.asks))
            prompt = fresh((user_prompt(topic, subject, intent, rng) for _ in iter(int, 1)), prompts)
        response = fresh((answer(topic, subject, intent, rng) for _ in iter(int, 1)), responses)
        out.append(Exchange(prompt, response))
    return out


def pair(prompt: str, chosen: str, rejected: str, subset: str) -> Row:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "subset": subset,
    }


def topic_pairs(by_topic: list[list[Exchange]]) -> Iterator[Row]:
    """Row j of one topic is rejected with row j of another. The step between the two topics depends on j alone, so at
    each j the responses are permuted among the topics: each is chosen once and rejected once."""
    for topic_index, (topic, own) in enumerate(zip(TOPICS, by_topic, strict=True)):
        for j, exchange in enumerate(own):
            other = by_topic[(topic_index + 1 + j % (len(TOPICS) - 1)) % len(TOPICS)][j]
            yield pair(exchange.prompt, exchange.response, other.response, topic.name)


def format_pairs(rng: random.Random, prompts: set[str], responses: set[str]) -> Iterator[Row]:
    """Two responses under two prompts: one asks for a list, the other for a sentence, and the preference turns round."""

    def asks(templates: tuple[str, ...], subject: str) -> Iterator[str]:
        while True:
            yield f"{rng.choice(GREETINGS)}{rng.choice(templates).format(s=subject)}{rng.choice(THANKS)}"

    def lists(topic: Topic) -> Iterator[str]:
        while True:
            yield "\n".join(f"- {tip}" for tip in rng.sample(topic.tips, rng.choice((2, 3, 4))))

    def sentences(topic: Topic, subject: str) -> Iterator[str]:
        while True:
            yield rng.choice(topic.openings[rng.choice(list(topic.openings))]).format(s=subject)

    for topic in TOPICS:
        for index in range(FORMAT_PROMPTS_PER_TOPIC // 2):
            subject = topic.subjects[index % len(topic.subjects)]
            as_list = fresh(lists(topic), responses)
            as_sentence = next(sentences(topic, subject))
            yield pair(fresh(asks(LIST_ASKS, subject), prompts), as_list, as_sentence, "format")
            yield pair(fresh(asks(SENTENCE_ASKS, subject), prompts), as_sentence, as_list, "format")


def rows_to_score(rng: random.Random, prompts: set[str], responses: set[str]) -> list[Row]:
    """Two rows a topic under one prompt, an answer and an answer to something else; then rows with three responses."""
    made = [exchanges(topic, 1, rng, prompts, responses)[0] for topic in TOPICS]
    rows: list[Row] = []
    for index, (topic, exchange) in enumerate(zip(TOPICS, made, strict=True)):
        stray = made[(index + 3) % len(made)].response
        rows.append({"id": f"{topic.name}-answer", "prompt": exchange.prompt, "response": exchange.response})
        rows.append({"id": f"{topic.name}-off-topic", "prompt": exchange.prompt, "response": stray})
    for index in range(0, len(TOPICS), 2):
        own, *others = (exchanges(TOPICS[(index + step) % len(TOPICS)], 1, rng, prompts, responses)[0] for step in (0, 1, 4))
        choices = [own.response, *(other.response for other in others)]
        rows.append({"id": f"{TOPICS[index].name}-best-is-first", "prompt": own.prompt, "responses": choices})
    return rows


def check_pairs(rows: list[Row]) -> None:
    """The promise of the module's docstring, as far as counting can tell."""
    chosen = Counter(row["chosen"][0]["content"] for row in rows)
    rejected = Counter(row["rejected"][0]["content"] for row in rows)
    assert chosen == rejected, "a response text is chosen more often than rejected, or the other way round"
    assert all(row["chosen"] != row["rejected"] for row in rows)


def render(messages: list[dict[str, str]]) -> str:
    """What the chat template makes of messages."""
    return "".join(f"{IM_START}{message['role']}\n{message['content']}{IM_END}\n" for message in messages)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE: its alphabet holds all 256 bytes, so any text can be encoded and there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    # A word takes its leading space with it; digits stand alone, and so do runs of punctuation and of newlines.
    words = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in (PAD, IM_START, IM_END)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_config() -> Row:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": IM_END,
        "bos_token": None,
        "unk_token": None,
        "additional_special_tokens": [IM_START],
        "model_max_length": MAX_LENGTH,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }


def model_config(tokenizer: Tokenizer) -> Row:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_LENGTH,
        "hidden_act": "silu",
        "initializer_range": 0.1,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.token_to_id(PAD),
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(IM_END),
    }


def write_lines(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")


def write_model(folder: Path, texts: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    for name, content in (("tokenizer_config.json", tokenizer_config()), ("config.json", model_config(tokenizer))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8", newline="\n")


def main() -> None:
    rng = random.Random(SEED)
    prompts: set[str] = set()
    responses: set[str] = set()
    by_topic = [exchanges(topic, ROWS_PER_TOPIC, rng, prompts, responses) for topic in TOPICS]
    rows = [*topic_pairs(by_topic), *format_pairs(rng, prompts, responses)]
    check_pairs(rows)
    rng.shuffle(rows)
    OUT.mkdir(parents=True, exist_ok=True)
    write_lines(OUT / "pairs.jsonl", rows)
    write_lines(OUT / "responses.jsonl", rows_to_score(rng, prompts, responses))
    write_model(OUT / "model", [render(row["prompt"] + row[side]) for row in rows for side in ("chosen", "rejected")])
    print(f"{len(rows)} pairs, {len(prompts)} prompts, in {OUT}")  # noqa: T201


if __name__ == "__main__":
    main()
