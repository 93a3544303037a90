"""From NM datasets to a finding, or to the reason why there is none. Knows nothing of networks or tables."""
