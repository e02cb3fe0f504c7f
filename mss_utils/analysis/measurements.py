"""All measurements of a run, written as tables."""

import pandas as pd
from tqdm.auto import tqdm

from mss_utils.analysis.attack import attack_scores, find_onsets, mean_envelopes
from mss_utils.analysis.bottleneck import measure_bottleneck
from mss_utils.analysis.hypotheses import evaluate_hypotheses
from mss_utils.analysis.phase import phase_scores
from mss_utils.analysis.repetition import measure_repetition
from mss_utils.analysis.studies import data_amount
from mss_utils.config import Run
from mss_utils.data import Store
from mss_utils.files import write_text
from mss_utils.models.unet import STFT
from mss_utils.separation import read_all_estimates

TABLES = ("phase", "attack", "envelopes", "bottleneck", "repetition", "data_amount")
TABLES += ("hypotheses", "ablations")
ENVELOPE_KEYS = ["target", "model", "seed", "time_ms"]
BOTTLENECK_COLUMNS = ["target", "track", "model", "seed", "intervention", "sdr"]
REPETITION_COLUMNS = ["target", "track", "start_s", "model", "seed", "lag_s", "condition"]
REPETITION_COLUMNS += ["sdr", "reason"]


def analyse(run: Run, store: Store, tracks: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Take all measurements on the estimates of the test tracks; write and return the tables.

    `tracks` is that table of the evaluation. With the setting `data_study`, more models are
    trained. A repetition that cannot be measured has a row whose `reason` says why.
    """
    tables = _measure_estimates(run, store)
    bottleneck, rows = [], []
    for target in store.targets(run.settings.target):
        changes = measure_bottleneck(run, store, target)
        bottleneck += tqdm(changes, desc=f"Bottleneck changed, {target}", unit="row")
        repetition = measure_repetition(run, store, target)
        rows += tqdm(repetition, desc=f"Damaged repeat, {target}", unit="row")
    tables["bottleneck"] = pd.DataFrame(bottleneck, columns=BOTTLENECK_COLUMNS)
    tables["repetition"] = pd.DataFrame(rows, columns=REPETITION_COLUMNS)
    tables["data_amount"] = data_amount(run, store, tracks)
    tables["hypotheses"] = evaluate_hypotheses(run.settings, tables | dict(tracks=tracks))
    for name, table in tables.items():
        write_text(run.table(name), table.to_csv(index=False))
    return tables


def _measure_estimates(run: Run, store: Store) -> dict[str, pd.DataFrame]:
    """Compute the tables phase, attack and envelopes."""
    stft, rate = STFT(run.settings.n_fft, run.settings.hop), store.sample_rate
    phase, attack, envelopes = [], [], []
    for track in tqdm(store.split("test"), desc="Phase and attack", unit="track"):
        _, stems = store.load(track)
        all_estimates = read_all_estimates(run, store, track)
        for i, target in enumerate(store.targets(run.settings.target)):
            reference = stems[store.stem_index(target)]
            onsets_s = find_onsets(store, track, target)
            estimates = {key: estimate[i] for key, estimate in all_estimates.items()}
            for (model, seed), estimate in estimates.items():
                key = dict(target=target, track=track.name, model=model, seed=seed)
                phase += [key | band for band in phase_scores(reference, estimate, rate, stft)]
                attack.append(key | attack_scores(reference, estimate, onsets_s, rate))
            levels = mean_envelopes(reference, estimates, onsets_s, rate)
            envelopes += [dict(target=target) | level for level in levels]
    by_time = pd.DataFrame(envelopes, columns=[*ENVELOPE_KEYS, "level"])
    by_time = by_time.groupby(ENVELOPE_KEYS, sort=False, as_index=False)
    means = by_time.agg(level=("level", "mean"), tracks=("level", "size"))
    return dict(phase=pd.DataFrame(phase), attack=pd.DataFrame(attack), envelopes=means)
