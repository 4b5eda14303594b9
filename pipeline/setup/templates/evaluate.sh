#!/bin/bash
# Scores of the label maps. It is short and begins anew each time.
#SBATCH --job-name={{name}} --output={{log}}
#SBATCH --requeue --open-mode=append
{{directives}}

{{prologue}}
exec {{command}}
