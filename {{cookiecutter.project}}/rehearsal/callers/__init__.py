"""Who calls the bot: over a Twilio media stream, over WebRTC."""
