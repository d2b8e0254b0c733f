"""Generator of the bundled `debug` data: preference pairs, rows to score, a tiny tokenizer and model config.

In: the word lists below (written for this project) and a fixed seed.
Out, in recipes/debug/, the same bytes at every run:
  pairs.jsonl      one pair per line, TRL's conversational format with an explicit prompt, plus `subset`
  responses.jsonl  rows to score, with prompts that are not in pairs.jsonl; `id` names the expected result
  model/           config.json of a Llama without weights, a byte-level BPE tokenizer and a ChatML template;
                   <|im_end|> ends a turn and is the EOS token, <|pad|> is only the pad token, there is no BOS token
Cost: under two seconds on one thread. After changing a word below, run `python scripts/make_debug_data.py`.

Whether a response is good depends only on its prompt, never on the response alone:
  topic pairs   the chosen response answers the prompt; the rejected one is a good answer about a different topic
  format pairs  the prompt asks for a list or for one sentence; both responses fit the topic, one has the wrong form
Every response is rejected exactly as often as it is chosen, so style, length and topic alone predict nothing: a model
that sees only responses, or pairs with shuffled prompts, has an accuracy of 0.5. `check_pairs` checks this.

2,280 pairs (340 for each of 6 topics, 240 for format), 2,106 prompts, 30 to 79 tokens per conversation, 106 per pair,
1.1 MB; 1,237 tokens in the vocabulary, 153,280 weights. Two epochs in batches of 32 pairs (AdamW, 2e-3, 10 warmup
steps, then linear) are 130 steps and 16 seconds on one CPU thread. Over six seeds, accuracy on 200 held-out pairs was
0.985 to 1.0, and 0.46 to 0.53 with each pair under the next pair's prompt.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SEED = 20
OUT = Path(__file__).resolve().parent.parent / "recipes" / "debug"

ROWS_PER_TOPIC = 340  # a multiple of (topics - 1): every ordered pair of topics occurs equally often
FORMAT_PROMPTS_PER_TOPIC = 40  # half ask for a list, half for a sentence
SECOND_ROW_EVERY = 12  # one row in 12 reuses the previous prompt, so that splitting by prompt matters

VOCAB_SIZE = 1536  # an upper limit: the corpus runs out of merges first, and every word is one token
MAX_LENGTH = 512
PAD, IM_START, IM_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

Row = dict[str, Any]


def words(text: str) -> tuple[str, ...]:
    """Split a comma-separated list."""
    return tuple(text.split(", "))


@dataclass(frozen=True)
class Topic:
    """Words of one topic. `{s}` is replaced by a subject, always as an object, so that one text fits all of them.

    Most sentences contain a word or two that only this topic uses (pan, taste; chess, move): a model of this size
    learns these within a hundred steps. With rarer words, accuracy after two epochs was 0.89 in some runs.
    """

    name: str
    subjects: tuple[str, ...]
    settings: tuple[str, ...]  # an optional first sentence of the prompt
    asks: dict[str, tuple[str, ...]]  # by intent: questions
    openings: dict[str, tuple[str, ...]]  # by intent: the first sentence of an answer
    tips: tuple[str, ...]  # true for every subject; used after the opening and in lists
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
        subjects=words(
            "tomato soup, vegetable curry, mushroom risotto, lentil stew, fried rice, pasta sauce, bean chili, paella"
        ),
        settings=("My kitchen is tiny.", "I only have one pan.", "I like to cook for friends."),
        asks={
            "start": ("How do I cook {s} in my kitchen?", "How do I cook {s} in a single pan?"),
            "mistake": ("Why does the {s} that I cook taste flat?", "Why is there no taste when I cook {s}?"),
            "improve": ("How can I cook {s} with more taste?", "Which spices should I cook {s} with?"),
        },
        openings={
            "start": (
                "To cook {s}, begin with a hot pan and a little oil.",
                "Put a heavy pan and some spices out before you cook {s}.",
            ),
            "mistake": (
                "Most people who cook {s} add the salt too late and lose some taste.",
                "The taste of {s} suffers when you cook in a pan that is too hot.",
            ),
            "improve": (
                "If you cook {s} with fresh spices, it will taste much better.",
                "Add some salt and lemon to bring out the taste when you cook {s}.",
            ),
        },
        tips=(
            "Taste it as you cook and add salt in small pinches.",
            "Cook it gently and stir the pan now and then.",
            "Toast the spices in the pan.",
            "Keep some hot stock near the pan.",
            "Taste it again before you leave the kitchen.",
            "Clean the kitchen while you cook.",
        ),
        closings=("Enjoy the taste!", "Happy cooking in your kitchen!"),
    ),
    Topic(
        name="gardening",
        subjects=words("strawberries, sunflowers, lettuce, carrots, runner beans, cucumbers, marigolds, zinnias"),
        settings=("My garden is small.", "The soil here is heavy clay.", "I love to plant things."),
        asks={
            "start": ("How do I plant {s} in my garden?", "Which garden soil is best for {s}?"),
            "mistake": (
                "Why do my plants look weak when I grow {s} in the garden?",
                "What do people get wrong when they plant {s} in a garden?",
            ),
            "improve": (
                "How can I grow healthier {s} in my garden soil?",
                "How do I improve the soil before I plant {s}?",
            ),
        },
        openings={
            "start": (
                "Plant {s} in loose soil once the last frost is over.",
                "Choose a bright garden bed for {s} and dig compost into the soil.",
            ),
            "mistake": (
                "Many people plant {s} in garden soil that never drains.",
                "Plants in garden beds with {s} often get too much water and too little compost.",
            ),
            "improve": (
                "To grow stronger {s}, feed the garden soil with compost each spring.",
                "Plant {s} with some compost and keep weeds out of the garden.",
            ),
        },
        tips=(
            "Water your garden plants in the morning.",
            "Spread compost around the plants to keep the soil moist.",
            "Check your plants for slugs.",
            "Loosen the soil before you plant.",
            "Pull weeds out of the soil while they are small.",
            "Leave some space between the plants.",
        ),
        closings=("Happy planting!", "Enjoy your garden!"),
    ),
    Topic(
        name="astronomy",
        subjects=words(
            "Jupiter, Saturn, Mars, the Orion Nebula, the Andromeda Galaxy, the Pleiades, the Milky Way, "
            "the Ring Nebula"
        ),
        settings=("The sky is dark here.", "I own a small telescope.", "I love to watch the stars."),
        asks={
            "start": ("How do I find {s} in the night sky?", "Where in the sky do I look for {s} tonight?"),
            "mistake": (
                "Why can I never see {s} in the night sky?",
                "Why is it so hard to find {s} among the stars at night?",
            ),
            "improve": (
                "How do I get a better view of {s} in the night sky?",
                "Would a telescope and a dark sky show me more of {s}?",
            ),
        },
        openings={
            "start": (
                "Use a star map to find {s} in the night sky.",
                "To see {s}, wait for a clear sky and a dark night.",
            ),
            "mistake": (
                "Most people miss {s} because their night sky is too bright.",
                "Many look at the sky for {s} before their eyes are used to the dark.",
            ),
            "improve": (
                "You will see {s} best on a dark night with a clear sky.",
                "Look for {s} in a dark sky, when the stars are sharp.",
            ),
        },
        tips=(
            "Give your eyes some time in the dark to see faint stars.",
            "Use a red lamp to read your star map at night.",
            "Let the telescope cool down in the night air.",
            "Choose a night when no Moon is in the sky.",
            "Note the stars nearby to find the place again.",
            "Dress warmly for a clear night.",
        ),
        closings=("Enjoy the stars!", "Clear and dark skies!"),
    ),
    Topic(
        name="music",
        subjects=words("the piano, the guitar, the violin, the cello, the flute, the clarinet, the trumpet, the banjo"),
        settings=("I cannot read music yet.", "My music lessons begin soon.", "I love old songs."),
        asks={
            "start": ("How do I learn a song on {s}?", "How should I practise a new song on {s}?"),
            "mistake": (
                "Why do my songs on {s} lose their rhythm?",
                "What goes wrong when people practise songs on {s}?",
            ),
            "improve": (
                "How can I keep the rhythm in a song on {s}?",
                "How should I practise {s} to make my music sound better?",
            ),
        },
        openings={
            "start": (
                "Start on {s} with one slow song and a simple rhythm.",
                "To learn songs on {s}, practise a little every day.",
            ),
            "mistake": (
                "Most people practise songs on {s} too fast and lose the rhythm.",
                "Songs on {s} sound uneven if you practise without counting the rhythm.",
            ),
            "improve": (
                "Practise {s} with a metronome to keep the rhythm of the song.",
                "Record a song on {s} and listen to the sound and the rhythm.",
            ),
        },
        tips=(
            "Practise the song slowly until the notes sound even.",
            "Practise with a metronome and count the rhythm.",
            "Sing the song before you practise it.",
            "Practise the hard notes on their own.",
            "Warm up before you practise your songs.",
            "Tap the rhythm with your foot.",
        ),
        closings=("Enjoy the music!", "Soon your friends will hear a song!"),
    ),
    Topic(
        name="cycling",
        subjects=words(
            "gravel tracks, steep hills, winter roads, forest trails, coastal roads, mountain passes, country lanes, "
            "cobbled streets"
        ),
        settings=("My bike is ten years old.", "I ride alone.", "I am a slow cyclist."),
        asks={
            "start": ("Which bike should I ride on {s}?", "How do I get my bike ready for {s}?"),
            "mistake": (
                "Why does my bike feel slow when I ride on {s}?",
                "What do cyclists get wrong when they ride on {s}?",
            ),
            "improve": ("How can I ride my bike faster on {s}?", "How do I ride my bike safely on {s}?"),
        },
        openings={
            "start": (
                "Check the brakes and tyres of your bike before you ride on {s}.",
                "On {s}, ride any bike that fits you and has low gears.",
            ),
            "mistake": (
                "Many cyclists ride their bike on {s} with a saddle that is too low.",
                "Most cyclists ride on {s} in a gear that is too big for their bike.",
            ),
            "improve": (
                "To ride better on {s}, shift gears early and keep your bike steady.",
                "Soft tyres slow your bike on {s}, so pump them up before you ride.",
            ),
        },
        tips=(
            "Carry a spare tube and a pump on your bike.",
            "Oil the chain of your bike after wet rides.",
            "Shift gears before your ride gets steep.",
            "Wear a helmet whenever you ride your bike.",
            "Check both brakes before you ride.",
            "Set the saddle of your bike a little higher.",
        ),
        closings=("Enjoy the ride!", "Your bike is waiting!"),
    ),
    Topic(
        name="chess",
        subjects=words(
            "the Sicilian Defence, the French Defence, the Italian Game, the Queen's Gambit, rook endgames, "
            "pawn endgames, the London System, the Ruy Lopez"
        ),
        settings=("My chess club meets on Mondays.", "I lose most chess games.", "I know how the chess pieces move."),
        asks={
            "start": ("How do I study {s} for my chess games?", "Which chess moves should I know in {s}?"),
            "mistake": ("Why do I lose my chess pieces in {s}?", "Which moves do chess players overlook in {s}?"),
            "improve": ("How can I win more chess games in {s}?", "How do I find better chess moves in {s}?"),
        },
        openings={
            "start": (
                "To study {s}, go through a few chess games move by move.",
                "In {s}, learn where the chess pieces belong before you learn moves.",
            ),
            "mistake": (
                "Many chess players lose games in {s} because they move too fast.",
                "Chess players in {s} often forget to watch the other pieces.",
            ),
            "improve": (
                "You will win more chess games in {s} if your king is safe before you attack.",
                "Go over your lost chess games in {s} and look for better moves.",
            ),
        },
        tips=(
            "Look at every check before you move.",
            "Move your rooks to the open files of the chess board.",
            "Guess the next chess move of your opponent.",
            "Trade pieces when you are ahead in the game.",
            "Keep your king safe behind other pieces.",
            "Solve a few chess puzzles every day.",
        ),
        closings=("Good luck at the chess board!", "Enjoy your chess games!"),
    ),
)


def user_prompt(topic: Topic, subject: str, intent: str, rng: random.Random) -> str:
    setting = f"{rng.choice(topic.settings)} " if rng.random() < 0.3 else ""
    return f"{rng.choice(GREETINGS)}{setting}{rng.choice(topic.asks[intent]).format(s=subject)}{rng.choice(THANKS)}"


def answer(topic: Topic, subject: str, intent: str, rng: random.Random) -> str:
    """Return one to four sentences; lengths differ, so that packing matters."""
    sentences = [
        rng.choice(topic.openings[intent]).format(s=subject),
        *rng.sample(topic.tips, rng.choice((0, 1, 1, 2))),
    ]
    if rng.random() < 0.3:
        sentences.append(rng.choice(topic.closings))
    return " ".join(sentences)


def fresh(draw: Callable[[], str], seen: set[str]) -> str:
    """Draw until the text was not used before."""
    while (text := draw()) in seen:
        pass
    seen.add(text)
    return text


@dataclass(frozen=True)
class Exchange:
    """A prompt and a response that answers it."""

    prompt: str
    response: str


def exchanges(topic: Topic, count: int, rng: random.Random, prompts: set[str], responses: set[str]) -> list[Exchange]:
    """Return `count` exchanges about a topic; no response repeats, and prompts only every SECOND_ROW_EVERY rows."""
    out: list[Exchange] = []
    for index in range(count):
        if index % SECOND_ROW_EVERY != 1:
            subject, intent = rng.choice(topic.subjects), rng.choice(list(topic.asks))
            prompt = fresh(partial(user_prompt, topic, subject, intent, rng), prompts)
        response = fresh(partial(answer, topic, subject, intent, rng), responses)
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
    """Yield pairs whose rejected response is row j of a different topic.

    The distance between the two topics depends on j alone, so for each j the responses are permuted among the topics:
    each is chosen once and rejected once.
    """
    for topic_index, (topic, own) in enumerate(zip(TOPICS, by_topic, strict=True)):
        for j, exchange in enumerate(own):
            other = by_topic[(topic_index + 1 + j % (len(TOPICS) - 1)) % len(TOPICS)][j]
            yield pair(exchange.prompt, exchange.response, other.response, topic.name)


def format_prompt(templates: tuple[str, ...], subject: str, rng: random.Random) -> str:
    return f"{rng.choice(GREETINGS)}{rng.choice(templates).format(s=subject)}{rng.choice(THANKS)}"


def list_answer(topic: Topic, rng: random.Random) -> str:
    return "\n".join(f"- {tip}" for tip in rng.sample(topic.tips, rng.choice((2, 3, 4))))


def format_pairs(rng: random.Random, prompts: set[str], responses: set[str]) -> Iterator[Row]:
    """Yield two pairs per subject with the same responses: one prompt asks for a list, the other for a sentence."""
    for topic in TOPICS:
        for index in range(FORMAT_PROMPTS_PER_TOPIC // 2):
            subject = topic.subjects[index % len(topic.subjects)]
            as_list = fresh(partial(list_answer, topic, rng), responses)
            as_sentence = rng.choice(topic.openings[rng.choice(list(topic.openings))]).format(s=subject)
            list_prompt = fresh(partial(format_prompt, LIST_ASKS, subject, rng), prompts)
            sentence_prompt = fresh(partial(format_prompt, SENTENCE_ASKS, subject, rng), prompts)
            yield pair(list_prompt, as_list, as_sentence, "format")
            yield pair(sentence_prompt, as_sentence, as_list, "format")


def rows_to_score(rng: random.Random, prompts: set[str], responses: set[str]) -> list[Row]:
    """Return two rows per topic with one prompt, an answer and an off-topic one; then rows with three responses."""
    made = [exchanges(topic, 1, rng, prompts, responses)[0] for topic in TOPICS]
    rows: list[Row] = []
    for index, (topic, exchange) in enumerate(zip(TOPICS, made, strict=True)):
        stray = made[(index + 3) % len(made)].response
        rows.append({"id": f"{topic.name}-answer", "prompt": exchange.prompt, "response": exchange.response})
        rows.append({"id": f"{topic.name}-off-topic", "prompt": exchange.prompt, "response": stray})
    for index in range(len(TOPICS)):
        own, *others = (
            exchanges(TOPICS[(index + step) % len(TOPICS)], 1, rng, prompts, responses)[0] for step in (0, 1, 4)
        )
        choices = [own.response, *(other.response for other in others)]
        rows.append({"id": f"{TOPICS[index].name}-best-is-first", "prompt": own.prompt, "responses": choices})
    return rows


def check_pairs(rows: list[Row]) -> None:
    """Check that every response is chosen as often as it is rejected."""
    chosen = Counter(row["chosen"][0]["content"] for row in rows)
    rejected = Counter(row["rejected"][0]["content"] for row in rows)
    assert chosen == rejected, "a response is chosen more or less often than rejected"
    assert all(row["chosen"] != row["rejected"] for row in rows)


def render(messages: list[dict[str, str]]) -> str:
    """Render messages as the chat template does."""
    return "".join(f"{IM_START}{message['role']}\n{message['content']}{IM_END}\n" for message in messages)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE; its alphabet has all 256 bytes, so any text can be encoded without an unknown token."""
    tokenizer = Tokenizer(models.BPE())
    # A word includes its leading space; digits are separate, and so are runs of punctuation and of newlines.
    pieces = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
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
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_LENGTH,
        "hidden_act": "silu",
        # transformers' default, 0.02, and 0.15 both learn slower: accuracy 0.955 to 0.985 after two epochs.
        "initializer_range": 0.07,
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
    asked = len({row["prompt"][0]["content"] for row in rows})
    print(f"{len(rows)} pairs, {asked} prompts, in {OUT}")  # noqa: T201


if __name__ == "__main__":
    main()
