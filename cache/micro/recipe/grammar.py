"""What micro's voices say: short everyday sentences from templates, over a few hundred words that cover every English phone.

Cased and punctuated as Whisper writes. Some bigrams are deliberately fixed ("traffic lights", "New York", "ice cream"): the language
statistics that the decoder can learn are known. A sentence belongs to the held-out part by the hash of its text, so that no list has to be kept.
"""

import hashlib
import random
import re
from functools import cache

WORDS = {
    "name": "John Sarah Jack Lucy George Mary Tom Kate Zoe Jeff Charlie Ruth Beth Mike",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "month": "January March April June July August",
    "number": "two three four five six seven eight nine ten eleven twelve thirteen fifteen twenty thirty fifty",
    "food": "wings fish chips cheese bread butter rice chicken beef soup salad fruit cake chocolate pizza sushi eggs ham jam tea coffee "
    "milk sugar salt pepper sauce garlic potatoes beans cherries toast honey lunch dinner breakfast oranges lemons onions apples "
    "peaches juice water",
    "adjective": "hot cold fresh sweet sour spicy huge small big red green blue yellow white black old new young happy sad quick slow good bad "
    "great nice long short heavy light clean quiet noisy strong thick thin cheap strange funny famous lazy busy angry rich poor "
    "soft sharp smooth dark bright warm dry",
    "comparative": "hotter colder bigger smaller older younger better worse longer shorter faster slower cheaper richer",
    "noun": "house car dog cat bird horse ship sheep chair table kitchen garden school church shop street city village road train bus "
    "station river ocean beach mountain forest tree window door king queen judge teacher child woman man friend brother sister "
    "mother father doctor nurse song movie question answer letter book page phone picture bridge boat box bag shoe shirt jacket "
    "hat watch ring key cup glass knife spoon plate toy coin garage treasure machine computer voice choice boy girl baby job game "
    "team ball farm cow pig goat duck fox lion tiger mouse story poem measure vision",
    "nouns": "houses cars dogs cats birds horses shoes books pages questions answers boxes watches keys boys girls friends children "
    "celebrities people lights trees stories songs games things voices choices",
    "verbs": "likes wants loves needs sees finds buys sells hates keeps brings takes makes gives shows",
    "verb": "like want love need see find buy sell watch choose bring take make keep catch teach touch measure push pull wash",
    "past": "saw found bought sold took made lost kept caught taught brought dropped washed pushed pulled touched opened closed watched chose heard",
    "doing": "running walking singing feeding eating cooking drinking reading writing jumping sleeping thinking talking watching washing "
    "dancing swimming shouting laughing playing",
    "does": "runs walks sings jumps sleeps thinks talks dances swims laughs shouts works",
    "place": "in on under behind near with from above",
    "often": "usually quickly slowly always never often really together again today tomorrow yesterday outside",
    "we": "I you we they",
    "she": "he she it",
    "where": "where why when how",
    "colour": "red green blue yellow white black orange pink purple brown",
}
"""Slots of the templates: name -> the words that may stand there."""

TEMPLATES = """
The {adjective} {noun} {verbs} the {noun}.
The {noun} is very {adjective}.
The {noun} is {comparative} than the {noun}.
{we} {past} a {adjective} {noun} {place} the {noun}.
{she} {verbs} {food} and {food}.
{we} {verb} {food} with {food}.
{name} {verbs} {adjective} {food}.
{name} and {name} {past} the {noun} on {day}.
{day} is a very good day.
Good morning, {name}.
Good night, {name}.
Thank you very much.
Thank you, {name}.
Excuse me, {where} is the {noun}?
Where is the {noun}?
Why is the {noun} so {adjective}?
How much is the {noun}?
How many {nouns} do you see?
When is {name} coming home?
What is the name of the {noun}?
Who {past} my {noun}?
Do you like {food}?
Do you want {food} or {food}?
Can I have {number} {nouns}, please?
I have {number} {nouns} and {number} {nouns}.
There are {number} {nouns} {place} the {noun}.
There is a {adjective} {noun} {place} the {noun}.
The traffic lights are {colour}.
Stop at the traffic lights.
The traffic lights turned {colour} again.
{we} {past} the traffic lights near the {noun}.
We had {food} and {food} today.
I love ice cream and orange juice.
{name} {verbs} ice cream with {food}.
Fish and chips, please.
They eat bread and butter with {food}.
Hot {food} and cold {food}.
He is {doing} {place} the {noun}.
They are {doing} with the {nouns}.
{name} is {doing} while {name} is {doing}.
{name} {often} {does} {place} the {noun}.
We {often} {verb} the {adjective} {noun}.
{she} never {verbs} {food}.
My {noun} is {adjective} and {adjective}.
Your {noun} is not {adjective}.
His {noun} was {adjective}, but her {noun} was {adjective}.
This {noun} is {adjective}.
That is a {adjective} {noun}.
These {nouns} are {adjective}.
Those {nouns} are very {adjective}.
Her {colour} {noun} and his {colour} {noun}.
Please open the {noun}.
Please close the {adjective} {noun}.
Please {verb} the {noun}.
Let me {verb} the {noun}.
I think the {noun} is {adjective}.
She said the {noun} was {adjective}.
We will {verb} it on {day}.
{name} will be here in {month}.
It was {adjective} in {month}.
The washing machine is {adjective}.
Turn on the television.
New York is a big city.
Last night {name} {past} the {noun}.
Right now {we} {verb} the {noun}.
Of course {we} {verb} {food}.
It is {number} in the morning.
The show {verbs} {adjective} {nouns}.
The show where {nouns} answer {adjective} questions.
The show where celebrities answer {adjective} questions while {doing}.
Celebrities answer {adjective} questions while {doing} even {comparative} {food}.
Hot ones.
Feeding even {comparative} {food}.
{comparative} {food}, even {comparative} {food}.
The {nouns} answer questions while feeding the {nouns}.
Even {comparative} {nouns}.
{number}, {number}, {number}, {number}.
{food}, {food} and {food}.
{colour}, {colour} and {colour}.
{number} {adjective} {nouns}.
The {adjective} {noun}.
Very {adjective} {food}.
Very good.
A very {adjective} {noun}.
It is not very {adjective}.
The {noun} and the {noun}.
{name}, where are you?
Hello, {name}.
Yes, it is.
No, thank you.
Maybe {day}.
I would {verb} the {nouns}.
They could {verb} the {adjective} {noun}.
You should {verb} {number} {nouns}.
She has {number} {nouns}.
If {name} {verbs} it, {name} {verbs} it.
""".strip().splitlines()

BLOG_SENTENCE = "Hot ones. The show where celebrities answer hot questions while feeding even hotter wings."
"""The sentence that the blog post "Interpreting Whisper" plays with. Held out; its parts follow from the templates."""

HELD_OUT_IN = 10
"""One text of this many is held out."""


def sentence(rng: random.Random) -> str:
    """One sentence, now and then two short ones."""
    text = _fill(rng.choice(TEMPLATES), rng)
    if len(text) < 40 and rng.random() < 0.15:
        text += " " + _fill(rng.choice(TEMPLATES), rng)
    return text


def word_string(rng: random.Random) -> str:
    """One to six words in no order, as a sentence. What is said can't be guessed, so a model that reads them must hear."""
    words = rng.choices(vocabulary(), k=rng.randint(1, 6))
    text = (", " if rng.random() < 0.25 else " ").join(words)
    return _capitalised(text) + "."


@cache
def vocabulary() -> tuple[str, ...]:
    """All words, sorted, lower case but for names and "I"."""
    slots = [word for words in WORDS.values() for word in words.split()]
    lower = {word.lower() for word in slots}
    proper = {word for word in slots if word[0].isupper()} | {"York"}
    fixed = {word for template in TEMPLATES for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", template))}
    return tuple(sorted(proper | set(slots) | {word.lower() for word in fixed if word not in proper and word.lower() not in lower} | {"an"}))


def is_held_out(text: str) -> bool:
    """Whether a text belongs to the part that training never sees. Templates without slots never do: there is only one of each."""
    return text == BLOG_SENTENCE or (text not in TEMPLATES and hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_IN == 0)


def _fill(template: str, rng: random.Random) -> str:
    text = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(WORDS[slot[1]].split()), template)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return _capitalised(text)


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]
