"""Everything for the ear: excerpts chosen by rules, the switching player, the listening page, the blind test, any track or song.

    player.py      versions under one transport, in one piece of HTML       excerpts.py   which tracks, which seconds, one level
    questions.py   what of the three questions can be heard                 page.py       listening.html
    ratings.py     answers of the blind test, mean opinion                  widgets.py    menus and upload fields of notebook 06

Taught in notebook 06; the players are used in notebooks 01 to 04 too.
"""

from mss_utils.listening.blind_test import (
    TABLES,
    add_answers,
    answer_files,
    opinion_sentence,
    ratings_of,
)
from mss_utils.listening.excerpts import (
    RANKS,
    VERSIONS,
    Excerpt,
    chosen_tracks,
    cut_excerpt,
    excerpt_players,
    excerpts,
    same_score,
    validation_excerpt,
)
from mss_utils.listening.page import listening_page, write_page
from mss_utils.listening.player import document, encode_mp3, frame, players, recoded
from mss_utils.listening.widgets import answers_field, chooser, own_song

__all__ = [
    "RANKS",
    "TABLES",
    "VERSIONS",
    "Excerpt",
    "add_answers",
    "answer_files",
    "answers_field",
    "chooser",
    "chosen_tracks",
    "cut_excerpt",
    "document",
    "encode_mp3",
    "excerpt_players",
    "excerpts",
    "frame",
    "listening_page",
    "opinion_sentence",
    "own_song",
    "players",
    "ratings_of",
    "recoded",
    "same_score",
    "validation_excerpt",
    "write_page",
]
