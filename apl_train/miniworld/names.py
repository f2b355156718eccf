"""Fictional names of the miniature world: unique given name and unique surname a person, 2-4 BPE tokens in all.

S_ID ("train"), S_test ("test") and the group kept for final figures ("final") are disjoint by person, given name
and surname. Surnames are built from syllables; names in "unknown" are never shown to any model.
"""

from __future__ import annotations

import random
from collections.abc import Callable


def _words(text: str) -> list[str]:
    return text.split()


FEMALE = _words("""alma ada bianca carmen celia clara cora daisy dalia edith elena ella esme fiona freya gemma
gloria greta hazel heidi helen ida ingrid irene iris ivy jade joan judith june kira laila leah lena lila lorna luna
mabel maeve maria marta mina mira molly nadia naomi nina nora olga opal paula pearl petra ramona rita rosa ruth
sadie selma silvia sofia stella tara tessa thea ursula vera viola willa yara zara zelda""")
MALE = _words("""abel adam alan albert amos anton arlo arthur asher axel basil boris bruno byron caleb carl cedric
clive conrad cyrus damian dexter edgar elias emil enzo ezra felix fergus finn gavin gideon hank hector henry hugo
igor isaac ivan jasper joel jonas julian karl kurt leo leon levi lionel louis lucas magnus marcus milo morris nathan
neil nigel noah oscar otis otto owen pablo percy quentin ralph raul rex roman rufus silas simon stefan theo tobias
victor walter wesley xavier yusuf""")
ONSETS = _words("""bal ber bor cal cor dar dun fal fen gal gar hal har kel kor lan lor mal mar mor nar nel or pel quin
ral ros sal sel tal tor ul val vel wen yar zel""")
CODAS = _words("""aby adel amir an ard ath aven beck bin borg bury croft dale den din dor ell en ert eth field fin gard
gate holt ick ika ima ine ing ira ish kar ket land leigh lin lock man mer mont more nak nor olt oro ova rel rick rin
rog san sen shaw son stad sten tan ter thal tin ton ula uni val ver vik vin win wood yama yen zan""")


def draw_names(
    genders: list[str], count_tokens: Callable[[str], int], seed: int = 11
) -> list[str]:
    """One name for each gender given, e.g. "greta velholt". Deterministic.

    Raises ValueError when the lists run out of given names.
    """
    rng = random.Random(seed)
    pools = {"female": FEMALE.copy(), "male": MALE.copy()}
    for pool in pools.values():
        rng.shuffle(pool)
    surnames = sorted({a + b for a in ONSETS for b in CODAS})
    rng.shuffle(surnames)
    taken: list[str] = []
    for gender in genders:
        if not pools[gender]:
            raise ValueError(f"no {gender} given name is left for person {len(taken)}")
        first = pools[gender].pop()
        while True:
            name = f"{first} {surnames.pop()}"
            if 2 <= count_tokens(name) <= 4:
                taken.append(name)
                break
    return taken
