"""Benchmarks: each module measures one thing and its ``main()`` prints one table, with all ratios from one run."""
