"""Many runs: experiments, statistics, reports."""
