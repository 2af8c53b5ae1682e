"""`python -m experiments.scenes` draws a sheet of scenes to look at."""

from experiments.scenes.scenes import main

main()
