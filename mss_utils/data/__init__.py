"""From a dataset folder to a stem store, and the audit of its content.

    dataset root --find_tracks, read_track (sources.py)--> stems at their own rate
                 --build_store (store.py)--> Store: memory-mapped int16 at the working rate
                 --audit, co_activity, audit_warnings (auditing.py)--> tables and warnings

Taught in notebook 01.
"""

from mss_utils.data.auditing import audit, audit_warnings, co_activity
from mss_utils.data.levels import SILENCE_DB, level_db, loudest_start, rms, window_levels_db
from mss_utils.data.sources import MIXTURE, dataset_root, find_tracks, is_built_in
from mss_utils.data.store import (
    Store,
    Track,
    build_store,
    check_target_exists,
    is_decoded,
    is_store,
    open_store,
    read_store,
)
