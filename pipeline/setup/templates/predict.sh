#!/bin/bash
# Label maps of the cases that are evaluated.
#SBATCH --job-name={{name}} --output={{log}}
#SBATCH --requeue --open-mode=append --signal=USR1@{{signal_seconds}}
{{directives}}

{{prologue}}
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not take it over by itself

# A signal ends the command like a kill: the file in flight is lost, and made again.
srun {{command}}
code=$?

if [ $code -gt 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt {{num_restarts}} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
