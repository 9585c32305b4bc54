"""The course: papers, studies and their records, runs of notebooks."""
