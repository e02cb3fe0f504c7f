"""The thin helper behind the notebooks: data, models, training, scores and figures of a source-separation report."""
