"""Write and read image files that contain their recipe."""
