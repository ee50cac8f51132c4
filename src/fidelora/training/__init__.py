"""AI Toolkit's side: what a training job's folder says, and the recipes that make its previews again."""
