"""What is trained beside a frozen model: applied to it from outside, stored in PEFT's files."""
