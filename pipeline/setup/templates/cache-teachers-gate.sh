#!/bin/bash
# Stage one before its parts: all cases onto the student grid, and are the teachers good enough?
#SBATCH --job-name={{name}} --output={{log}}
#SBATCH --requeue --open-mode=append --signal=USR1@{{signal_seconds}}
{{directives}}

{{prologue}}
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not take it over by itself

# A signal ends the command like a kill: the unit in flight is lost, and made again.
srun {{command}} --gate-only
code=$?

if [ $code -gt 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt {{num_restarts}} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
